"""How strongly the condition drives each block: the sizes of its adaLN shifts, scales and gates."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.dit import DiT

PARTS = ("attention_shift", "attention_scale", "attention_gate", "mlp_shift", "mlp_scale", "mlp_gate")
MANY = 20
TOGETHER = 64  # conditions whose modulations exist at once


class Modulations(NamedTuple):
    """The sizes of the parts of the modulation for every pair of a timestep and a label."""

    timesteps: np.ndarray
    """(T,)"""
    labels: np.ndarray
    """(Y,), the null class included if there is one."""
    sizes: dict[str, np.ndarray]
    """{one of PARTS: (T, Y, depth)}."""


def measure_modulations(model: DiT, timesteps: Sequence[int], labels: Sequence[int]) -> Modulations:
    """The sizes at each of these timesteps for all labels, or these where there are more than MANY, and for none."""
    classes = model.config.num_classes
    labels = np.arange(classes) if classes <= MANY else np.unique(labels)[:MANY]
    null = [classes] if model.config.class_dropout_prob else []
    t, y = np.asarray(timesteps, np.int32), np.array([*labels, *null], np.int32)
    sizes = modulation_sizes(model, np.repeat(t, len(y)), np.tile(y, len(t)))
    return Modulations(t, y, {part: values.reshape(len(t), len(y), -1) for part, values in sizes.items()})


def modulation_sizes(model: DiT, t: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """The root mean square over the channels of each part of the modulation, for pairs of timestep and label.

    t: (B,) in 0..999, y: (B,) -> {one of PARTS: (B, depth) float32}. A block without a gate has one that is 1; one
    without adaLN has the same everywhere.
    """
    sizes = [_sizes(model, t[i : i + TOGETHER], y[i : i + TOGETHER]) for i in range(0, len(t), TOGETHER)]
    return {part: np.concatenate([np.asarray(some[i]) for some in sizes]) for i, part in enumerate(PARTS)}


def widest_condition_gates(model: DiT, steps: int) -> np.ndarray:
    """The largest gate of each head, (depth, heads), over all timesteps below `steps` and all labels.

    For heads that the condition gates: a head that is 0 here is shut whatever the image.
    """

    @jax.jit
    def widest(model: DiT) -> jax.Array:
        t = model.t_embedder(jnp.arange(steps))
        of_block = lambda block, c: block.attn.gate(None, c).max(axis=(0, 1))  # noqa: E731
        of_label = lambda y: jax.vmap(of_block, in_axes=(0, None))(model.blocks, t + y)  # noqa: E731
        return jax.lax.map(of_label, model.y_embedder.embedding_table[...]).max(axis=0)

    return np.asarray(widest(model))


@jax.jit
def _sizes(model: DiT, t: jax.Array, y: jax.Array) -> list[jax.Array]:
    c = model.t_embedder(t) + model.y_embedder(y)
    shape = (model.config.depth, len(t))
    rms = [jnp.sqrt(jnp.square(part).mean(axis=(-2, -1))) for part in model.modulations(c)]
    return [jnp.broadcast_to(size, shape).T for size in rms]
