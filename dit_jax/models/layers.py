"""Layers that DiT's modules share: Linear, LayerNorm, modulation."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dit_jax.config import PRECISIONS, Precision
from dit_jax.models.products import product
from dit_jax.parallel.sharding import gather_batch, shard_batch, shard_features

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
zeros = nnx.initializers.zeros_init()
xavier_uniform = nnx.initializers.xavier_uniform()
normal_002 = nnx.initializers.normal(0.02)
STATISTICS = "statistics of a norm"  # two numbers a token, the name by which `jax.checkpoint` keeps them
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


class Linear(nnx.Module):
    """Affine map of the last axis, `x W + b`, its matrix product in `precision`, its parameters float32."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        precision: Precision = PRECISIONS["float32"],
        kernel_init: Initializer = xavier_uniform,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.precision = precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., in_features) -> (..., out_features) in `precision.results`."""
        rows = product(x, self.kernel[...], self.precision)
        return (rows + self.bias[...].astype(rows.dtype)).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh form of GELU (Hendrycks & Gimpel 2016, sec. 2), with (1 + tanh u) / 2 written as sigmoid(2 u).

    So XLA computes its gradient on a GPU in one pass over x, where tanh has another for itself.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x * jax.nn.sigmoid(GELU_SLOPE * (x + 0.044715 * x**3)), x


def _gelu_backward(x: jax.Array, d_out: jax.Array) -> tuple[jax.Array]:
    # In another order than forward: where blocks are unrolled, XLA would keep what both have in common.
    square = 0.044715 * x * x
    weight = jax.nn.sigmoid(GELU_SLOPE * x * (1 + square))
    return (d_out * weight * (1 + GELU_SLOPE * x * (1 - weight) * (1 + 3 * square)),)


gelu_tanh.defvjp(_gelu_forward, _gelu_backward)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float = 1e-6) -> jax.Array:
    """LayerNorm (Ba et al. 2016) without affine parameters, then `x (1 + scale) + shift`; float32 whatever x is.

    x: (B, N, D); shift and scale: (B or 1, 1, D), the same for every token. The backward pass starts from these again.
    """
    each = len(x), 1, x.shape[-1]
    return _modulated_norm(x, jnp.broadcast_to(shift, each), jnp.broadcast_to(scale, each), eps)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return _norm_forward(x, shift, scale, eps)[0]


def _norm_forward(
    x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    inverse_std = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    # Kept for the backward pass alone: computing the output again derives its own, and XLA joins that with other work.
    mean, inverse_std = checkpoint_name(mean, STATISTICS), checkpoint_name(inverse_std, STATISTICS)
    return centred * inverse_std * (1 + scale) + shift, (x, scale, mean, inverse_std)


def _norm_backward(eps: float, kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, ...]:
    # A normed token has mean 0, so that both means that its gradient needs come from one pass. What JAX derives takes
    # two: by compiled steps of XL/2 it moves 24 GB on v5e where this moves 20.
    x, scale, mean, inverse_std = kept
    normed = (x.astype(jnp.float32) - mean) * inverse_std
    d_normed = d_out * (1 + scale)
    d_x = d_normed - d_normed.mean(-1, keepdims=True) - normed * (d_normed * normed).mean(-1, keepdims=True)
    return (
        (d_x * inverse_std).astype(x.dtype),
        d_out.sum(1, keepdims=True),
        (d_out * normed).sum(1, keepdims=True),
    )


_modulated_norm.defvjp(_norm_forward, _norm_backward)


def plain_norm(x: jax.Array) -> jax.Array:
    """x: (B, N, D) -> its LayerNorm without affine parameters, float32."""
    zero = jnp.zeros((1, 1, x.shape[-1]))
    return modulated_norm(x, zero, zero)


class RMSNorm(nnx.Module):
    """Division of the last axis by its root mean square, and a learned scale (Zhang & Sennrich 2019); float32."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jnp.ones(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., features) -> the same, float32."""
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * self.weight[...]


class LearnedNorm(nnx.Module):
    """The affine parameters of a LayerNorm that no condition moves, in the place of a `Modulation`."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.bias, self.weight = nnx.Param(jnp.zeros(features)), nnx.Param(jnp.ones(features))

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Shift and scale, (1, 1, D) float32 each, as `modulated_norm` takes them."""
        return self.bias[...][None, None], self.weight[...][None, None] - 1


class Modulation(nnx.Module):
    """Linear map from the activated condition to `chunks` vectors of the hidden width, zero at initialisation."""

    def __init__(self, hidden_size: int, chunks: int, *, rngs: nnx.Rngs):
        self.linear = Linear(hidden_size, chunks * hidden_size, kernel_init=zeros, rngs=rngs)
        self.chunks = chunks

    @staticmethod
    def activated(c: jax.Array) -> jax.Array:
        """c: (B, D) float32 condition -> its SiLU, the same for all blocks, brought together over fsdp: it is small,
        and the weights that it meets are a third of DiT's and stay where they are."""
        return gather_batch(nnx.silu(c))

    def __call__(self, c: jax.Array) -> tuple[jax.Array, ...]:
        """c: (B, D) as `activated` leaves it -> `chunks` arrays (B, 1, D) float32."""
        values = shard_batch(shard_features(self.linear(c)))
        return tuple(jnp.split(values[:, None, :], self.chunks, axis=-1))


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        activation: Callable[[jax.Array], jax.Array],
        precision: Precision = PRECISIONS["float32"],
        kernel_init: Initializer = xavier_uniform,
        rngs: nnx.Rngs,
    ):
        self.fc1 = Linear(in_features, hidden_features, precision=precision, kernel_init=kernel_init, rngs=rngs)
        self.fc2 = Linear(hidden_features, out_features, precision=precision, kernel_init=kernel_init, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (..., in_features) -> (..., out_features)."""
        return self.fc2(self.activation(self.fc1(x)))
