"""What computes attention of all to all: XLA, cuDNN, or our TPU kernel, of one signature."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from dit_jax.models.flash import OUTPUT, flash_attention
from dit_jax.models.products import matmul, sum_over_rows, times_transpose

Attend = Callable[[jax.Array, int], jax.Array]
"""(qkv (B, N, 3 H d), columns ordered by head, then [q, k, v]; head_dim d) -> (B, N, H d)."""


def xla_attention(qkv: jax.Array, head_dim: int) -> jax.Array:
    """qkv: (B, N, 3D), columns ordered by head, then [q, k, v] -> (B, N, D)."""
    B, N, columns = qkv.shape
    q, k, v = qkv.reshape(B, N, -1, 3, head_dim).transpose(3, 0, 2, 1, 4)
    return dot_product_attention(q, k, v).transpose(0, 2, 1, 3).reshape(B, N, columns // 3)


def by_cores(attend: Attend) -> Attend:
    """`attend` in parts of the batch, as many as a CPU has cores for each device, and at most 8.

    XLA computes the products of all heads on one core, and beside them, on another, what does not depend on them. A
    part has every n-th image, so that images stay on their device.
    """

    def attend_in_parts(qkv: jax.Array, head_dim: int) -> jax.Array:
        cores = (os.cpu_count() or 1) // jax.local_device_count()
        parts = math.gcd(max(1, len(qkv) // jax.device_count()), min(max(1, cores), 8))
        images = qkv.reshape(-1, parts, *qkv.shape[1:])
        out = jnp.stack([attend(images[:, part], head_dim) for part in range(parts)], axis=1)
        return out.reshape(*qkv.shape[:2], -1)

    return attend_in_parts


def cudnn_attention(qkv: jax.Array, head_dim: int) -> jax.Array:
    """The same by NVIDIA's fused kernel, which takes bfloat16 and heads whose width is a multiple of 8."""
    B, N, columns = qkv.shape
    heads = qkv.reshape(B, N, -1, 3, head_dim)
    q, k, v = (heads[..., part, :] for part in range(3))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").reshape(B, N, columns // 3)


KERNELS = {"xla": xla_attention, "cores": by_cores(xla_attention), "cudnn": cudnn_attention, "flash": flash_attention}


def kernel_outputs_saveable(primitive: Primitive, *operands: Any, **parameters: Any) -> bool:
    """A policy of jax.checkpoint: what cuDNN and our kernel return is kept, so that neither runs again backward.

    XLA's attention runs again: what its backward pass needs grows with the square of the length.
    """
    if primitive.name == "dot_product_attention_fwd_wrapper":  # cuDNN's, with the statistics of its softmax
        return True
    return jax.checkpoint_policies.save_only_these_names(OUTPUT)(primitive, *operands, **parameters)


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
