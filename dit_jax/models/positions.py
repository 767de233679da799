"""Where a patch is: fixed sinusoids that are added to tokens, and rotations of queries and keys."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np


@lru_cache
def sincos_positions(hidden_size: int, side: int) -> np.ndarray:
    """Fixed 2-D positions of a square of side x side patches -> (side * side, hidden_size) float32.

    The first half of the channels encodes the column, the second the row; each is [sin, cos] over falling
    frequencies (Vaswani et al. 2017, sec. 3.5, in two dimensions). Computed in float64.
    """
    axis = sincos_table(hidden_size // 2, side)
    columns, rows = np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def sincos_table(features: int, length: int) -> np.ndarray:
    """Fixed positions of a sequence: (length, features) float64, [sin, cos] over falling frequencies."""
    half = features // 2
    omega = 10000.0 ** -(np.arange(half) / half)
    angles = np.arange(length)[:, None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def rotated(x: jax.Array) -> jax.Array:
    """x: (B, N, H, d) queries or keys of the N patches of a square, row by row -> the same, turned by their places.

    The first half of a head turns with the column, the second with the row, as our fixed positions have it; feature i
    turns with feature i + d/4 by the angle place * 10000^(-i / (d/4)) (Su et al. 2021, eq. 15, for two dimensions).
    """
    B, N, H, d = x.shape
    cos, sin = (table[:, None] for table in rotary_table(d, N))
    first, second = jnp.split(x.astype(jnp.float32).reshape(B, N, H, 2, d // 2), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x.shape)


@lru_cache
def rotary_table(head_dim: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (N, 2, d/4) float32 of the angles, by column and by row."""
    side = round(tokens**0.5)
    omega = 10000.0 ** -(np.arange(head_dim // 4) / (head_dim // 4))
    angles = np.arange(side)[:, None] * omega
    both = np.stack([np.tile(angles, (side, 1)), np.repeat(angles, side, axis=0)], axis=1)
    return np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)
