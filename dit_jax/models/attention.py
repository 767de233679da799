"""Multi-head self-attention over the patches."""

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.config import DiTConfig
from dit_jax.models.flash import flash_attention
from dit_jax.models.layers import Linear


class SelfAttention(nnx.Module):
    """Every patch attends to every patch; fused qkv with bias, scale head_dim^-0.5 (Vaswani et al. 2017, eq. 1).

    The columns of qkv are ordered by head, then [q, k, v]: a mesh that splits them evenly splits whole heads.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width, dtype=config.compute_dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=config.compute_dtype, rngs=rngs)
        self.head_dim = width // config.num_heads
        self.attend = KERNELS[config.kernel]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, N, D) -> (B, N, D)."""
        return self.proj(self.attend(self.qkv(x), self.head_dim))


def xla_attention(qkv: jax.Array, head_dim: int) -> jax.Array:
    """qkv: (B, N, 3D), columns ordered by head, then [q, k, v] -> (B, N, D)."""
    B, N, columns = qkv.shape
    q, k, v = qkv.reshape(B, N, -1, 3, head_dim).transpose(3, 0, 2, 1, 4)
    return dot_product_attention(q, k, v).transpose(0, 2, 1, 3).reshape(B, N, columns // 3)


def cudnn_attention(qkv: jax.Array, head_dim: int) -> jax.Array:
    """The same by NVIDIA's fused kernel, which takes bfloat16 and heads whose width is a multiple of 8."""
    B, N, columns = qkv.shape
    heads = qkv.reshape(B, N, -1, 3, head_dim)
    q, k, v = (heads[..., part, :] for part in range(3))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").reshape(B, N, columns // 3)


KERNELS = {"xla": xla_attention, "cudnn": cudnn_attention, "flash": flash_attention}


@jax.custom_vjp
def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q, k, v: (B, H, N, d) -> (B, H, N, d) in their dtype; the softmax is float32.

    The softmax's division waits until after the product with v, where a row has d numbers and not N. On a CPU that is
    a third faster forward, and the products of `_backward` a quarter faster than what JAX derives.
    """
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    exponentials = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    norm = 1.0 / exponentials.sum(axis=-1, keepdims=True)
    exponentials = exponentials.astype(v.dtype)
    out = jnp.einsum("bhnm,bhmd->bhnd", exponentials, v, preferred_element_type=jnp.float32)
    out = (out * norm).astype(v.dtype)
    return out, (q, k, v, exponentials, norm, out)


def _backward(kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, exponentials, norm, out = kept
    d_out = (d_out * norm).astype(v.dtype)
    d_v = jnp.einsum("bhnm,bhnd->bhmd", exponentials, d_out)
    d_weights = jnp.einsum("bhnd,bhmd->bhnm", d_out, v, preferred_element_type=jnp.float32)
    # The sum over a row of weights * d_weights, without another pass over the rows.
    through_norm = jnp.sum((d_out * out).astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (exponentials * (d_weights - through_norm)).astype(q.dtype)
    d_q = jnp.einsum("bhnm,bhmd->bhnd", d_scores, k) * q.shape[-1] ** -0.5
    return d_q, jnp.einsum("bhnm,bhnd->bhmd", d_scores, q), d_v


dot_product_attention.defvjp(_forward, _backward)
