"""Attention to a part of the image: windows (Liu et al. 2021, arXiv 2103.14030) and neighbourhoods (Hassani et al.
2023, arXiv 2204.07143), computed block by block, so that the work falls with the size of the part."""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import AttentionKind
from dit_jax.models.flash import flash_attention
from dit_jax.models.kernels import KERNELS, Attend, attention_by_cores, dot_product_attention, split_heads

Array = jax.Array | np.ndarray


def make_attend(kind: AttentionKind, shifted: bool, everywhere: Attend) -> Attend:
    """What computes a kind of attention; `everywhere` is the kernel of global attention."""
    if kind.name == "global":
        return everywhere
    if kind.name == "mixed":
        window = make_attend(AttentionKind("window", kind.size), shifted, everywhere)
        return partial(mixed_attention, window=window, everywhere=everywhere)
    if kind.name == "window" and everywhere is flash_attention:
        return partial(windows_on_tpu, kind=kind, shifted=shifted)
    attention = attention_by_cores if everywhere is KERNELS["cores"] else dot_product_attention
    return partial(local_attention, kind=kind, shifted=shifted, attention=attention)


def mixed_attention(qkv: jax.Array, head_dim: int, *, window: Attend, everywhere: Attend) -> jax.Array:
    """Even heads by `window`, odd ones by `everywhere`: a mesh that splits heads evenly splits both evenly."""
    B, N, columns = qkv.shape
    halves = jax.lax.split(qkv.reshape(B, N, -1, 2, 3 * head_dim), (1, 1), axis=3)
    both = (attend(half.reshape(B, N, -1), head_dim) for half, attend in zip(halves, (window, everywhere), strict=True))
    return jnp.stack([out.reshape(B, N, -1, head_dim) for out in both], axis=3).reshape(B, N, columns // 3)


def windows_on_tpu(qkv: jax.Array, head_dim: int, kind: AttentionKind, shifted: bool) -> jax.Array:
    """Each window as an image of its own, by the TPU kernel, if tokens are many.

    By the traffic of compiled steps of S with windows of 8: at 1,024 tokens XLA, which keeps what it can on the chip,
    moves 7.9 GB and the kernel 8.1; at 4,096 tokens, where that no longer fits, 58 and 44.
    """
    B, N, columns = qkv.shape
    if N < 4096:
        return local_attention(qkv, head_dim, kind, shifted)
    side, mask = math.isqrt(N), _block_mask(kind, math.isqrt(N), shifted)
    cut, join, _ = _blocks(kind, side, shifted)
    windows = cut(qkv.reshape(B, side, side, columns))  # (B, windows, n, 3 H d)
    images = windows.reshape(-1, *windows.shape[2:])
    out = flash_attention(images, head_dim, None if mask is None else mask[:, 0])
    return join(out.reshape(*windows.shape[:3], -1)).reshape(B, N, columns // 3)


def local_attention(
    qkv: jax.Array, head_dim: int, kind: AttentionKind, shifted: bool, attention: Callable = dot_product_attention
) -> jax.Array:
    """Windows or neighbourhoods of a square image: blocks of queries, each with the block of keys that it may need."""
    B, N, columns = qkv.shape
    side = math.isqrt(N)
    q, k, v = split_heads(qkv.reshape(B, side, side, columns), head_dim)
    cut_queries, join, cut_keys = _blocks(kind, side, shifted)
    q, k, v = (jnp.moveaxis(x, -3, -2) for x in (cut_queries(q), cut_keys(k), cut_keys(v)))
    out = attention(q, k, v, _block_mask(kind, side, shifted))  # (B, blocks, H, n, d)
    return join(jnp.moveaxis(out, -3, -2)).reshape(B, N, columns // 3)


@lru_cache
def allowed(kind: AttentionKind, side: int, shifted: bool) -> np.ndarray:
    """(N, N) bool: whether the query (row) attends to the key (column), the tokens of the image row by row.

    For "mixed" it is that of the heads with windows.
    """
    i = np.arange(side)
    if kind.name == "global":
        axis = np.ones((side, side), bool)
    elif kind.name == "neighbourhood":
        first = np.clip(i - kind.size // 2, 0, side - kind.size)[:, None]
        axis = (first <= i) & (i < first + kind.size)
    else:
        window = (i + _shift(kind, shifted)) // kind.size
        axis = window[:, None] == window
    return (axis[:, None, :, None] & axis[None, :, None, :]).reshape(side**2, side**2)


def scores_computed(kind: AttentionKind, side: int) -> int:
    """Products of a query with a key that a head computes for an image, those that the mask hides included; "mixed" is
    the mean of its heads, to be halved exactly."""
    whole = side**4
    if kind.name == "global":
        return whole
    queries = -(-side // kind.size) * kind.size
    keys = _region(kind, side) if kind.name == "neighbourhood" else kind.size
    local = queries**2 * keys**2
    return (local + whole) // 2 if kind.name == "mixed" else local


def _shift(kind: AttentionKind, shifted: bool) -> int:
    return kind.size // 2 if shifted and kind.name != "neighbourhood" else 0


def _region(kind: AttentionKind, side: int) -> int:
    """Side of the square of keys that a tile of size x size queries needs."""
    return min(side, 2 * kind.size - 1)


def _blocks(kind: AttentionKind, side: int, shifted: bool) -> tuple[Callable, Callable, Callable]:
    """How images (B, side, side, ...) are cut into blocks (B, blocks, tokens, ...) of queries, joined again, and cut
    into the blocks of keys."""
    size, shift = kind.size, _shift(kind, shifted)
    tiles = -(-side // size)
    more = tiles * size - side

    def cut(x: Array) -> Array:
        xp = jnp if isinstance(x, jax.Array) else np
        x = xp.pad(x, ((0, 0), (0, more), (0, more), *[(0, 0)] * (x.ndim - 3)))
        x = xp.roll(x, (shift, shift), (1, 2)) if shift else x
        x = x.reshape(len(x), tiles, size, tiles, size, *x.shape[3:]).swapaxes(2, 3)
        return x.reshape(len(x), tiles**2, size**2, *x.shape[5:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), tiles, tiles, size, size, *x.shape[3:]).swapaxes(2, 3)
        x = x.reshape(len(x), tiles * size, tiles * size, *x.shape[5:])
        x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
        return x[:, :side, :side]

    if kind.name != "neighbourhood":
        return cut, join, cut
    region = _region(kind, side)
    firsts = [int(np.clip(tile * size - size // 2, 0, side - region)) for tile in range(tiles)]

    def cut_regions(x: Array) -> Array:
        xp = jnp if isinstance(x, jax.Array) else np
        x = xp.stack([x[:, first : first + region] for first in firsts], axis=1)
        x = xp.stack([x[:, :, :, first : first + region] for first in firsts], axis=2)
        return x.reshape(len(x), tiles**2, region**2, *x.shape[5:])

    return cut, join, cut_regions


@lru_cache
def _block_mask(kind: AttentionKind, side: int, shifted: bool) -> np.ndarray | None:
    """(blocks, 1, queries, keys) bool: `allowed` cut into blocks; None if it is true everywhere.

    What fills up a block attends to itself alone, and nothing attends to it.
    """
    cut_queries, _, cut_keys = _blocks(kind, side, shifted)
    tokens = 1 + np.arange(side**2).reshape(1, side, side)  # 0 fills up
    queries, keys = (cut(tokens)[0, ..., None] for cut in (cut_queries, cut_keys))
    seen = np.zeros((side**2 + 1, side**2 + 1), bool)
    seen[0, 0], seen[1:, 1:] = True, allowed(kind, side, shifted)
    mask = seen[queries, keys.swapaxes(1, 2)][:, None]
    if kind.name == "neighbourhood":
        mask = mask | (queries == 0)[:, None]
    return None if mask.all() else mask
