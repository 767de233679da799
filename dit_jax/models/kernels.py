"""What computes attention of all to all: XLA, cuDNN, or our TPU kernel, of one signature."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from dit_jax.auto import cudnn_takes
from dit_jax.errors import InputError
from dit_jax.models.flash import OUTPUT, flash_attention
from dit_jax.models.products import matmul, sum_over_rows, times_transpose

Attend = Callable[[jax.Array, int], jax.Array]
"""(qkv (B, N, 3 H d), columns ordered by head, then [q, k, v]; head_dim d) -> (B, N, H d)."""
OPERANDS = "queries, keys and values"  # the name by which `jax.checkpoint` keeps them


@jax.custom_vjp
def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """q: (..., n, d), k and v: (..., m, d) -> (..., n, d) in their dtype; the softmax is float32.

    mask: bool, broadcast to (..., n, m): which keys a query sees. One that sees none sees all alike.

    The softmax's division waits until after the product with v, where a row has d numbers and not N. On a CPU that is
    a third faster forward, and the products of `_backward` a quarter faster than what JAX derives.
    """
    return _forward(q, k, v, mask)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q = q * q.shape[-1] ** -0.5
    scores = times_transpose(q, k)
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    norm = 1.0 / exponentials.sum(axis=-1, keepdims=True)
    exponentials = exponentials.astype(v.dtype)
    out = (matmul(exponentials, v) * norm).astype(v.dtype)
    return out, (q, k, v, exponentials, norm, out)


def _backward(kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, exponentials, norm, out = kept
    d_out = d_out * norm
    # The sum over a row of weights * d_weights, without another pass over the rows.
    through_norm = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_out = d_out.astype(v.dtype)
    d_v = sum_over_rows(exponentials, d_out).astype(v.dtype)
    d_scores = (exponentials * (times_transpose(d_out, v) - through_norm)).astype(q.dtype)
    d_q = matmul(d_scores, k) * q.shape[-1] ** -0.5
    return d_q.astype(q.dtype), sum_over_rows(d_scores, q).astype(k.dtype), d_v, None


dot_product_attention.defvjp(_forward, _backward)


def attention_by_cores(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`dot_product_attention` of images (B, ...), all with one mask, in parts of the batch: as many as a CPU has cores
    for each device, and at most 8.

    XLA computes the products of all heads on one core, and beside them, on another, what does not depend on them. A
    part has every n-th image, so that images stay on their device.
    """
    cores = (os.cpu_count() or 1) // jax.local_device_count()
    parts = math.gcd(max(1, len(q) // jax.device_count()), min(max(1, cores), 8))
    images = [x.reshape(-1, parts, *x.shape[1:]) for x in (q, k, v)]
    out = [dot_product_attention(*(x[:, part] for x in images), mask) for part in range(parts)]
    return jnp.stack(out, axis=1).reshape(q.shape)


def split_heads(qkv: jax.Array, head_dim: int) -> list[jax.Array]:
    """qkv: (..., 3 H d), columns ordered by head, then [q, k, v] -> q, k and v, each (..., H, d).

    On a CPU the gradients of what was split are joined faster than those of slices, which are added up: attention of
    16 tokens trains a third faster so, windows a quarter.
    """
    heads = qkv.reshape(*qkv.shape[:-1], -1, 3, head_dim)
    return [part.squeeze(-2) for part in jax.lax.split(heads, (1, 1, 1), axis=heads.ndim - 2)]


def xla_attention(qkv: jax.Array, head_dim: int, attention: Callable = dot_product_attention) -> jax.Array:
    """qkv: (B, N, 3D), columns ordered by head, then [q, k, v] -> (B, N, D)."""
    B, N, columns = qkv.shape
    q, k, v = (part.swapaxes(1, 2) for part in split_heads(qkv, head_dim))
    return attention(q, k, v).swapaxes(1, 2).reshape(B, N, columns // 3)


def cudnn_attention(qkv: jax.Array, head_dim: int) -> jax.Array:
    """The same by NVIDIA's fused kernel. Raises InputError for what it does not take."""
    B, N, columns = qkv.shape
    if not cudnn_takes(N, head_dim, qkv.dtype):
        raise InputError(
            f"attention_kernel=cudnn does not take {N} tokens with {qkv.dtype} heads of width {head_dim}: expected an "
            "even number of tokens, and bfloat16 heads of a width of 8, 16, ... 128; or set attention_kernel=xla"
        )
    heads = qkv.reshape(B, N, -1, 3, head_dim)
    # Kept for the backward pass as they are split here. Slices: split_heads would move 1.5% more in a step of XL/2.
    q, k, v = (checkpoint_name(heads[..., part, :], OPERANDS) for part in range(3))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").reshape(B, N, columns // 3)


KERNELS = {
    "xla": xla_attention,
    "cores": partial(xla_attention, attention=attention_by_cores),
    "cudnn": cudnn_attention,
    "flash": flash_attention,
}


def attention_saveable(primitive: Primitive, *operands: Any, **parameters: Any) -> bool:
    """A policy of jax.checkpoint: what cuDNN is given is kept, and what it and our kernel return, so that neither runs
    again backward.

    XLA's attention runs again: what its backward pass needs grows with the square of the length.
    """
    if primitive.name == "dot_product_attention_fwd_wrapper":  # cuDNN's, with the statistics of its softmax
        return True
    return jax.checkpoint_policies.save_only_these_names(OUTPUT, OPERANDS)(primitive, *operands, **parameters)
