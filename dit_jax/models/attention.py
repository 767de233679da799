"""Multi-head attention: of the patches among themselves, and from them to a sequence of condition tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import DiTConfig
from dit_jax.models.kernels import Attend, dot_product_attention, split_heads
from dit_jax.models.layers import Linear, RMSNorm, zeros
from dit_jax.models.positions import rotated

Array = jax.Array | np.ndarray

# The axis along which parameters of a block's self-attention lie head by head.
HEAD_AXIS = {
    "attn/qkv/kernel": -1,
    "attn/qkv/bias": -1,
    "attn/gate/linear/kernel": -1,
    "attn/gate/linear/bias": -1,
    "attn/proj/kernel": -2,
}


def first_heads(path: str, leaf: Array, heads: int, of: int) -> Array:
    """The part of a block's parameter, or of the stack of them, that belongs to its first `heads` heads of `of`.

    A view, where the leaf is NumPy's; the whole leaf if it does not lie by heads.
    """
    axis = HEAD_AXIS.get(path.removeprefix("blocks/"))
    if axis is None or heads == of:
        return leaf
    return leaf[..., : leaf.shape[axis] // of * heads, *[slice(None)] * (-1 - axis)]


class SelfAttention(nnx.Module):
    """Patches attend to patches; fused qkv with bias, scale head_dim^-0.5 (Vaswani et al. 2017, eq. 1).

    The columns of qkv are ordered by head, then [q, k, v]: a mesh that splits them evenly splits whole heads. If the
    config says so, queries and keys are normalised (Henry et al. 2020) and rotated (Su et al. 2021), and heads gated.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.num_heads * config.head_width
        self.qkv = Linear(width, 3 * inner, precision=config.precision, rngs=rngs)
        self.proj = Linear(inner, width, precision=config.precision, rngs=rngs)
        self.head_dim = config.head_width
        self.q_norm = RMSNorm(config.head_width, rngs=rngs) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, rngs=rngs) if config.qk_norm else None
        self.rope = config.rope
        self.gate = HeadGate(config, rngs=rngs) if config.head_gate != "none" else None

    def __call__(self, x: jax.Array, c: jax.Array, attend: Attend) -> tuple[jax.Array, jax.Array | None]:
        """x: (B, N, D) tokens, c: (B, D) condition, attend: what computes the heads of qkv ->
        (B, N, D), and how far its heads were open (B, N or 1, H), or None without gates."""
        heads = attend(self.prepared(self.qkv(x)), self.head_dim)
        if self.gate is None:
            return self.proj(heads), None
        gates = self.gate(x, c)
        return self.proj(gated(heads, gates)), gates

    def prepared(self, qkv: jax.Array) -> jax.Array:
        """qkv (B, N, 3 H d) as attention multiplies it: with its queries and keys normalised and rotated, if the
        config says so."""
        operands = self.qkv.precision.operands
        if self.q_norm is None and not self.rope:
            return qkv.astype(operands)
        q, k, v = split_heads(qkv, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotated(q), rotated(k)
        return jnp.stack([part.astype(operands) for part in (q, k, v)], axis=3).reshape(qkv.shape)


class HeadGate(nnx.Module):
    """A factor for each head, from its query's token or from the condition (Qiu et al. 2025, arXiv 2505.06708).

    A sigmoid stretched as that of Louizos et al. (2018, sec. 2.2), to be exactly 1 at initialisation and exactly 0
    where a head is shut: max(0, 2.25 sigmoid(z) - 0.125), z = 0 at first, shut below -2.83, at most 2.125.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.linear = Linear(config.hidden_size, config.num_heads, kernel_init=zeros, rngs=rngs)
        self.by_token = config.head_gate == "token"

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """x: (B, N, D) tokens, c: (B, D) condition -> (B, N, H), or (B, 1, H) by the condition; float32."""
        z = self.linear(x) if self.by_token else self.linear(nnx.silu(c))[:, None]
        return jax.nn.relu(2.25 * jax.nn.sigmoid(z) - 0.125)


def gated(heads: jax.Array, gates: jax.Array) -> jax.Array:
    """heads: (B, N, H d), gates: (B, N or 1, H) -> (B, N, H d) in the dtype of heads."""
    by_head = heads.reshape(*heads.shape[:2], gates.shape[-1], -1)
    return (by_head * gates[..., None]).astype(heads.dtype).reshape(heads.shape)


class CrossAttention(nnx.Module):
    """Patches attend to condition tokens; zero at initialisation, and without tokens."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.num_heads * config.head_width
        self.q = Linear(width, inner, precision=config.precision, rngs=rngs)
        self.kv = Linear(width, 2 * inner, precision=config.precision, rngs=rngs)
        self.proj = Linear(inner, width, precision=config.precision, kernel_init=zeros, rngs=rngs)
        self.head_dim = config.head_width

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array) -> jax.Array:
        """x: (B, N, D) patches, context: (B, L, D) tokens, mask: (B, L) bool, True where there is one -> (B, N, D)."""
        B, N, _ = x.shape
        q, kv = (linear(of).astype(linear.precision.operands) for linear, of in ((self.q, x), (self.kv, context)))
        q = q.reshape(B, N, -1, self.head_dim).swapaxes(1, 2)
        k, v = kv.reshape(B, context.shape[1], -1, 2, self.head_dim).transpose(3, 0, 2, 1, 4)
        heads = dot_product_attention(q, k, v, mask[:, None, None, :])
        out = self.proj(heads.swapaxes(1, 2).reshape(B, N, -1))
        return jnp.where(mask.any(axis=1)[:, None, None], out, 0)
