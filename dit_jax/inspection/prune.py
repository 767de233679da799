"""Cutting shut heads out of the weights: a smaller network with the same outputs."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.config import DiTConfig, attention_layers
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.errors import InputError
from dit_jax.inspection.images import Images, noise_like
from dit_jax.models.attention import HEAD_AXIS
from dit_jax.models.dit import DiT, abstract_dit

TOLERANCE = 2e-5  # of outputs, absolute


def cut_heads(config: DiTConfig, params: dict, shut: np.ndarray) -> tuple[DiTConfig, dict]:
    """The network without the heads that are shut.

    A head whose gate is 0 adds nothing, so that the outputs stay the same wherever these gates stay shut. Of a block
    whose heads are all shut the last one stays. Mixed attention, whose even heads have windows, loses as many even
    heads as odd ones, and of either the last stays.

    params: nested, as `abstract_dit(config)` has them. shut: (depth, heads) bool.
    Raises InputError if there is nothing to cut, or the network has no gates or has cross-attention.
    """
    require_prunable(config)
    kept = kept_heads(config, shut)
    counts = tuple(len(heads) for heads in kept)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    for name, axis in HEAD_AXIS.items():
        leaves[f"blocks/{name}"] = _chosen(leaves[f"blocks/{name}"], kept, config.num_heads, axis)
    left = counts if len(set(counts)) > 1 else ()
    smaller = dataclasses.replace(config, num_heads=max(counts), head_dim=config.head_width, heads_left=left)
    return smaller, unflatten_dict(leaves, sep="/")


def shut_heads(model: DiT, diffusion: GaussianDiffusion, images: Images, steps: Sequence[int]) -> np.ndarray:
    """Which heads' gates are 0 for every token of the images at steps of the process: (depth, heads) bool."""
    model = exact(model)
    opened = jax.jit(lambda model, *inputs: model.with_gates(*inputs)[1].max(axis=1))
    with jax.default_matmul_precision("highest"):
        gates = [np.asarray(opened(model, *inputs)) for _, inputs in _noised(model, diffusion, images, steps)]
    return np.max(gates, axis=0) == 0


def require_same(model: DiT, smaller: DiT, diffusion: GaussianDiffusion, images: Images, steps: Sequence[int]) -> float:
    """The largest difference of the outputs, in float32, on images at steps of the process.

    Raises InputError if it is more than TOLERANCE: then a head opens there that was taken to be shut.
    """
    model, smaller = exact(model), exact(smaller)
    largest, forward = 0.0, jax.jit(lambda model, *inputs: model(*inputs))
    for t, inputs in _noised(model, diffusion, images, steps):
        with jax.default_matmul_precision("highest"):
            difference = float(jnp.abs(forward(model, *inputs) - forward(smaller, *inputs)).max())
        largest = max(largest, difference)
        if difference > TOLERANCE:
            raise InputError(
                f"without the heads that were shut the output at t={t} changes by {difference:.2g}: one opens there; "
                "measure more with --timesteps and --count"
            )
    return largest


def exact(model: DiT) -> DiT:
    """The same network in float32: in bfloat16 sums of fewer numbers are rounded to others."""
    graph, _ = abstract_dit(dataclasses.replace(model.config, dtype="float32", attention_kernel="auto"))
    return nnx.merge(graph, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _noised(
    model: DiT, diffusion: GaussianDiffusion, images: Images, steps: Sequence[int]
) -> Iterator[tuple[int, tuple[jax.Array, ...]]]:
    """(step, arguments of the network) for the images with noise added, with their labels and with none."""
    noise, null = noise_like(images.x0), np.full_like(images.labels, model.config.num_classes)
    for t in steps:
        x_t = diffusion.q_sample(images.x0, t, noise)
        for y in (images.labels, null) if model.config.class_dropout_prob else (images.labels,):
            yield t, (x_t, diffusion.original_timesteps(t, len(x_t)), y)


def require_prunable(config: DiTConfig) -> None:
    """Raise InputError for networks whose heads cannot be cut, whatever their gates."""
    if config.head_gate == "none":
        raise InputError("these heads have no gates that could be shut: train with config.model.head_gate=token")
    if config.context_features or config.block == "cross-attention":
        raise InputError("this network's cross-attention has as many heads and no gates: its heads cannot be cut")


def kept_heads(config: DiTConfig, shut: np.ndarray) -> list[np.ndarray]:
    """shut: (depth, heads) bool -> the heads of each block that stay, in an order that leaves windows theirs.

    Raises InputError if all of them stay.
    """
    kept = []
    layers = attention_layers(config.attention, config.depth)
    for row, kind, heads in zip(shut, layers, config.block_heads, strict=True):
        row = row[:heads]
        if kind.name == "mixed":
            even, odd = row[0::2], row[1::2]
            pairs = min(even.sum(), odd.sum(), len(even) - 1)
            stay = (2 * _without_shut(row[side::2], pairs) + side for side in (0, 1))
            kept.append(np.stack(list(stay), axis=1).reshape(-1))
        else:
            kept.append(_without_shut(row, min(row.sum(), heads - 1)))
    if [len(heads) for heads in kept] == list(config.block_heads):
        told = ", ".join(str(int(row[:heads].sum())) for row, heads in zip(shut, config.block_heads, strict=True))
        raise InputError(
            f"the blocks have {told} shut heads, and none of them can go: one head of a block stays, and mixed "
            "attention loses an even and an odd one; train longer, or with a larger config.head_gate_penalty"
        )
    return kept


def _without_shut(shut: np.ndarray, count: int) -> np.ndarray:
    """Indices that stay when the first `count` shut ones go."""
    return np.delete(np.arange(len(shut)), np.flatnonzero(shut)[:count])


def _chosen(leaf: np.ndarray, kept: list[np.ndarray], num_heads: int, axis: int) -> np.ndarray:
    """The parts of an axis of (depth, ...) that belong to the heads `kept` of each block, filled up with zeros."""
    by_head = np.moveaxis(leaf, axis, 1)
    by_head = by_head.reshape(len(leaf), num_heads, -1, *by_head.shape[2:])
    chosen = np.zeros((len(leaf), max(map(len, kept)), *by_head.shape[2:]), leaf.dtype)
    for of_block, theirs, heads in zip(chosen, by_head, kept, strict=True):
        of_block[: len(heads)] = theirs[heads]
    return np.moveaxis(chosen.reshape(len(leaf), -1, *chosen.shape[3:]), 1, axis)
