"""Latents to pictures in bounded memory: some images at a time, and large ones in tiles."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.autoencoder import AutoencoderKL, from_latents

TILE = 512  # pixels: side of the largest square that is decoded whole


def decode_pixels(vae: AutoencoderKL, latents: jax.Array, micro_batch: int = 4) -> jax.Array:
    """The images of a diffusion model's latents; what memory it takes beside them depends on `micro_batch` only.

    latents: (B, h, w, C) of unit variance, as `to_latents` makes them -> (B, H, W, out_channels) pixels, about within
    [-1, 1]. micro_batch: images decoded at once; on a mesh, a multiple of the devices that share the latents.
    """
    scale = vae.config.scaling_factor, vae.config.shift_factor
    return in_parts(lambda x: decode_tiled(vae, from_latents(x, *scale)), latents, micro_batch)


def in_parts(function: Callable[[jax.Array], jax.Array], x: jax.Array, size: int) -> jax.Array:
    """`function` of x, of which row b depends on row b of x only, `size` rows at a time, one part after the other.

    A part takes rows at equal distances: where devices share the rows of x, each goes through its own.
    """
    rows = len(x)
    size = min(size, rows)
    parts = -(-rows // size)
    padded = jnp.pad(x, [(0, parts * size - rows)] + [(0, 0)] * (x.ndim - 1))
    out = jax.lax.map(function, padded.reshape(size, parts, *x.shape[1:]).swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(size * parts, *out.shape[2:])[:rows]


def decode_tiled(vae: AutoencoderKL, z: jax.Array, tile: int = TILE) -> jax.Array:
    """`vae.decode` in squares of at most `tile` x `tile` pixels, one after the other, so that memory is bounded.

    Tiles overlap by a quarter or more and fade into each other linearly. An image that is one tile is decoded exactly;
    otherwise every tile is normalised, and attends, within itself.

    z: (B, h, w, C) as the encoder gives them -> (B, H, W, out_channels).
    """
    B, h, w, C = z.shape
    scale = vae.config.downsample
    height, width = (min(side, max(1, tile // scale)) for side in (h, w))
    if (height, width) == (h, w):
        return vae.decode(z)
    (tops, row_weights), (lefts, column_weights) = blending(h, height, scale), blending(w, width, scale)

    def add_tile(image: jax.Array, place: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        top, left, rows, columns = place
        pixels = vae.decode(jax.lax.dynamic_slice(z, (0, top, left, 0), (B, height, width, C)))
        corner = (0, top * scale, left * scale, 0)
        pixels = jax.lax.dynamic_slice(image, corner, pixels.shape) + pixels * rows[:, None, None] * columns[:, None]
        return jax.lax.dynamic_update_slice(image, pixels, corner), None

    down, across = (index.ravel() for index in np.indices((len(tops), len(lefts))))
    places = (tops[down], lefts[across], row_weights[down], column_weights[across])
    image = jnp.zeros((B, h * scale, w * scale, vae.config.out_channels))
    return jax.lax.scan(add_tile, image, places)[0]


def blending(length: int, tile: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tiles begin along a side of `length` latents, (n,), and what their pixels weigh, (n, tile * scale).

    A pixel weighs as much as it is far from the nearest end of its tile; the weights of one place sum to 1.
    """
    count = 1 + math.ceil((length - tile) / (tile - tile // 4))
    starts = np.linspace(0, length - tile, count).round().astype(np.int32)
    inside = np.arange(length * scale) + 0.5 - starts[:, None] * scale
    weights = np.minimum(inside, tile * scale - inside).clip(min=0)
    weights = (weights / weights.sum(0)).astype(np.float32)
    return starts, np.stack([row[start * scale :][: tile * scale] for row, start in zip(weights, starts, strict=True)])
