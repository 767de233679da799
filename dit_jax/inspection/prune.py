"""Cutting shut heads out of the weights: a smaller network with the same outputs."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.config import DiTConfig, attention_layers
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.errors import InputError
from dit_jax.inspection.images import Images, noise_like
from dit_jax.models.dit import DiT

TOLERANCE = 2e-5  # of outputs, absolute


def cut_heads(config: DiTConfig, params: dict, shut: np.ndarray) -> tuple[DiTConfig, dict]:
    """The network without heads that are shut, as many in every block because blocks are stacked.

    A head whose gate is 0 adds nothing, so that the outputs stay the same wherever these gates stay shut. Of a block
    with more shut heads than another the last ones stay, shut as they are. Mixed attention, whose even heads have
    windows, loses as many even heads as odd ones.

    params: nested, as `abstract_dit(config)` has them. shut: (depth, heads) bool.
    Raises InputError if there is nothing to cut, or the network has no gates or has cross-attention.
    """
    require_prunable(config)
    kept = kept_heads(config, shut)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    for path, columns in {"qkv": 3 * config.head_width, "gate/linear": 1}.items():
        for name in ("kernel", "bias"):
            full = f"blocks/attn/{path}/{name}"
            leaves[full] = _chosen(leaves[full], kept, columns, axis=-1)
    proj = "blocks/attn/proj/kernel"
    leaves[proj] = _chosen(leaves[proj], kept, config.head_width, axis=-2)
    smaller = dataclasses.replace(config, num_heads=kept.shape[1], head_dim=config.head_width)
    return smaller, unflatten_dict(leaves, sep="/")


def require_same(model: DiT, smaller: DiT, diffusion: GaussianDiffusion, images: Images, steps: Sequence[int]) -> float:
    """The largest difference of the outputs on images at steps of the process, with their labels and with none.

    Raises InputError if it is more than TOLERANCE: then a head opens there that was taken to be shut.
    """
    config, noise, largest = model.config, noise_like(images.x0), 0.0
    forward = jax.jit(lambda model, *inputs: model(*inputs))
    null = np.full_like(images.labels, config.num_classes)
    for t in steps:
        x_t = diffusion.q_sample(images.x0, t, noise)
        for y in (images.labels, null) if config.class_dropout_prob else (images.labels,):
            inputs = x_t, diffusion.original_timesteps(t, len(x_t)), y
            difference = float(jnp.abs(forward(model, *inputs) - forward(smaller, *inputs)).max())
            largest = max(largest, difference)
            if difference > TOLERANCE:
                raise InputError(
                    f"without the heads that were shut the output at t={t} changes by {difference:.2g}: one opens "
                    "there; measure more with --timesteps and --count"
                )
    return largest


def require_prunable(config: DiTConfig) -> None:
    """Raise InputError for networks whose heads cannot be cut, whatever their gates."""
    if config.head_gate == "none":
        raise InputError("these heads have no gates that could be shut: train with config.model.head_gate=token")
    if config.context_features or config.block == "cross-attention":
        raise InputError("this network's cross-attention has as many heads and no gates: its heads cannot be cut")


def kept_heads(config: DiTConfig, shut: np.ndarray) -> np.ndarray:
    """shut: (depth, heads) bool -> (depth, heads that stay) their indices, in an order that leaves windows theirs."""
    mixed = [kind.name == "mixed" for kind in attention_layers(config.attention, config.depth)]
    cuttable = [
        2 * min(row[0::2].sum(), row[1::2].sum()) if pairs else row.sum()
        for row, pairs in zip(shut, mixed, strict=True)
    ]
    step = 2 if any(mixed) else 1
    count = min(int(min(cuttable)), config.num_heads - 1) // step * step
    if not count:
        told = ", ".join(str(int(row.sum())) for row in shut)
        raise InputError(
            f"the blocks have {told} shut heads{', even and odd to be cut in pairs' if step == 2 else ''}, and each "
            "must lose as many: there is nothing to cut; train longer, or with a larger config.head_gate_penalty"
        )
    kept = []
    for row, pairs in zip(shut, mixed, strict=True):
        if pairs:
            even, odd = (2 * _open_after(row[side::2], count // 2) + side for side in (0, 1))
            kept.append(np.stack([even, odd], axis=1).reshape(-1))
        else:
            kept.append(_open_after(row, count))
    return np.stack(kept)


def _open_after(shut: np.ndarray, count: int) -> np.ndarray:
    """Indices that stay when the first `count` shut ones go."""
    return np.delete(np.arange(len(shut)), np.flatnonzero(shut)[:count])


def _chosen(leaf: np.ndarray, kept: np.ndarray, width: int, axis: int) -> np.ndarray:
    """The parts of an axis that belong to the heads `kept` (depth, heads), each `width` wide and in order of head."""
    blocks = []
    for layer, heads in zip(leaf, kept, strict=True):
        indices = (heads[:, None] * width + np.arange(width)).reshape(-1)
        blocks.append(np.take(layer, indices, axis=axis))
    return np.stack(blocks)
