"""Attention as one TPU kernel: scores and weights stay on the chip (after Dao et al. 2022, arXiv 2205.14135).

Whole rows of scores fit in a TPU's vector memory at DiT's lengths, so the softmax is the plain one, and the backward
pass computes the weights again: it keeps qkv, and nothing that grows with the square of the length.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from dit_jax.auto import FLASH_MEMORY, flash_heads, flash_rows
from dit_jax.errors import InputError
from dit_jax.parallel.sharding import TOKENS

OUTPUT = "attention"  # what policies of jax.checkpoint call the result
HIDDEN = -1e30  # added to the score of a key that its query does not see


def flash_attention(
    qkv: jax.Array, head_dim: int, mask: np.ndarray | None = None, *, interpret: bool = False
) -> jax.Array:
    """qkv: (B, N, 3D), columns ordered by head, then [q, k, v] -> (B, N, D) in its dtype; the softmax is float32.

    mask: (M, N, N) bool, which keys a query sees in each of the first M of B, in each of the next M, and so on; the
    images of a device are a multiple of M. Heads of any width: the 128 lanes of the chip are filled up inside the
    kernel only. On a mesh each device takes its own images and heads. interpret: run on any platform, slowly.
    """
    hidden = None if mask is None else jnp.where(mask, 0.0, HIDDEN)
    return checkpoint_name(_flash_attention(qkv, hidden, head_dim, interpret), OUTPUT)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _flash_attention(qkv: jax.Array, hidden: jax.Array | None, head_dim: int, interpret: bool) -> jax.Array:
    return _run(_forward_kernel, qkv.shape[-1] // 3, 2, head_dim, interpret, hidden, qkv)


def _forward(qkv: jax.Array, hidden: jax.Array | None, head_dim: int, interpret: bool) -> tuple[jax.Array, tuple]:
    return _flash_attention(qkv, hidden, head_dim, interpret), (qkv, hidden)


def _backward(head_dim: int, interpret: bool, kept: tuple, d_out: jax.Array) -> tuple[jax.Array, None]:
    qkv, hidden = kept
    return _run(_backward_kernel, qkv.shape[-1], 5, head_dim, interpret, hidden, qkv, d_out), None


_flash_attention.defvjp(_forward, _backward)


def _run(
    kernel, width: int, products: int, head_dim: int, interpret: bool, hidden: jax.Array | None, *arrays: jax.Array
) -> jax.Array:
    """The kernel on one image after the other, and as many heads at once as have room; its result has `width` columns
    over all devices.

    products: how many it computes of each head's (N, N) with (N, head_dim), for the compiler's and our own accounts.
    hidden: (M, N, N), added to the scores of M images in turn, or None.
    """

    def on_device(hidden: jax.Array | None, *arrays: jax.Array) -> jax.Array:
        (B, N, columns), dtype = arrays[0].shape, arrays[0].dtype
        if columns % (3 * head_dim):
            raise InputError(
                f"mesh.tensor does not divide the heads: {columns // 3} columns of {head_dim} are no heads"
            )
        if hidden is not None and B % len(hidden):
            raise InputError(f"{B} windows on a device are not those of whole images: give each device whole images")
        heads = columns // (3 * head_dim)
        at_once = flash_heads(vector_memory(), N, heads, head_dim, dtype)
        if not at_once:
            raise InputError(f"attention_kernel=flash has no room for {N} tokens on this TPU: set attention_kernel=xla")
        groups = heads // at_once
        parts = zip(*(jnp.split(array, groups, axis=-1) for array in arrays), strict=True)
        return jnp.concatenate([some_heads(hidden, *part) for part in parts], axis=-1)

    def some_heads(hidden: jax.Array | None, *arrays: jax.Array) -> jax.Array:
        (B, N, columns), dtype = arrays[0].shape, arrays[0].dtype
        in_turn = None if hidden is None else pl.BlockSpec((1, N, N), lambda b: (b % len(hidden), 0, 0))
        out = jax.ShapeDtypeStruct((B, N, width * columns // whole), dtype)

        def image(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
            return pl.BlockSpec((1, *array.shape[1:]), lambda b: (b, 0, 0))

        return pl.pallas_call(
            partial(kernel, head_dim=head_dim),
            grid=(B,),
            in_specs=[in_turn, *map(image, arrays)],
            out_specs=image(out),
            out_shape=out,
            cost_estimate=pl.CostEstimate(
                flops=2 * products * B * N * N * columns // 3,
                bytes_accessed=sum(array.size * dtype.itemsize for array in (*arrays, out)),
                transcendentals=B * N * N * columns // (3 * head_dim),
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=FLASH_MEMORY),
            interpret=interpret,
        )(hidden, *arrays)

    whole = arrays[0].shape[-1]
    if jax.sharding.get_abstract_mesh().empty:
        return on_device(hidden, *arrays)
    specs = (PartitionSpec(), *(TOKENS for _ in arrays))
    return jax.shard_map(on_device, in_specs=specs, out_specs=TOKENS, check_vma=False)(hidden, *arrays)


def vector_memory() -> float:
    """Bytes of it that a core has of the TPU that this is compiled for; elsewhere kernels are interpreted."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else math.inf


def _forward_kernel(hidden, qkv, out, *, head_dim: int) -> None:
    for head, (q, k, v) in enumerate(_heads(qkv, head_dim)):

        def rows(start: int, size: int, head=head, q=q, k=k, v=v) -> None:
            here = pl.ds(start, size)
            weights = _weights(qkv[0, here, q], qkv[0, :, k], hidden, here)
            o = _product(weights.astype(out.dtype), qkv[0, :, v], (1, 0))
            out[0, here, pl.ds(head * head_dim, head_dim)] = o.astype(out.dtype)

        _for_rows(qkv.shape[1], rows)


def _backward_kernel(hidden, qkv, d_out, d_qkv, *, head_dim: int) -> None:
    N, dtype = qkv.shape[1], qkv.dtype
    for head, (q, k, v) in enumerate(_heads(qkv, head_dim)):

        def rows(start: int, size: int, sums, head=head, q=q, k=k, v=v):
            d_k, d_v = sums
            here = pl.ds(start, size)
            q_here, d_o = qkv[0, here, q], d_out[0, here, pl.ds(head * head_dim, head_dim)]
            weights = _weights(q_here, qkv[0, :, k], hidden, here)
            d_weights = _product(d_o, qkv[0, :, v], (1, 1))
            d_scores = weights * (d_weights - jnp.sum(weights * d_weights, axis=1, keepdims=True))
            d_scores = (d_scores * head_dim**-0.5).astype(dtype)
            d_qkv[0, here, q] = _product(d_scores, qkv[0, :, k], (1, 0)).astype(dtype)
            d_v += _product(weights.astype(dtype), d_o, (0, 0))
            return d_k + _product(d_scores, q_here, (0, 0)), d_v

        zeros = jnp.zeros((N, head_dim), jnp.float32)
        d_k, d_v = _for_rows(N, rows, (zeros, zeros))
        d_qkv[0, :, k], d_qkv[0, :, v] = d_k.astype(dtype), d_v.astype(dtype)


def _heads(qkv, head_dim: int):
    """The columns of q, k and v of each head."""
    for start in range(0, qkv.shape[2], 3 * head_dim):
        yield tuple(pl.ds(start + part * head_dim, head_dim) for part in range(3))


def _for_rows(N: int, function, *sums):
    """`function(start, size, *sums)` of all rows, a block after the other, each given what the one before returned."""
    size = flash_rows(N)
    if size == N:
        return function(0, N, *sums)
    if not sums:
        return jax.lax.fori_loop(0, N // size, lambda i, _: function(i * size, size), None)
    return jax.lax.fori_loop(0, N // size, lambda i, sums: function(i * size, size, sums), *sums)


def _weights(q: jax.Array, k: jax.Array, hidden, here) -> jax.Array:
    """(n, d), (N, d) -> (n, N) float32 whose rows sum to 1 (Vaswani et al. 2017, eq. 1)."""
    scores = _product(q, k, (1, 1)) * q.shape[1] ** -0.5
    if hidden is not None:
        scores += hidden[0, here]
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The matrix product over one axis of each, in float32, whatever JAX's default precision: of bfloat16 the compiler
    of kernels takes no other than this one, and of float32 not each that there is."""
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
