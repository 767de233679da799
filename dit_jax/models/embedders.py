"""What a DiT is given as tokens and vectors of its hidden width: patches (and back), timestep, label and context."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.layers import Linear, Mlp, gelu_tanh, normal_002
from dit_jax.models.positions import sincos_positions, sincos_table


class PatchEmbed(nnx.Module):
    """Non-overlapping p x p patches as tokens, row by row, each with its fixed position added."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        features = config.patch_size**2 * config.in_channels
        self.proj = Linear(features, config.hidden_size, precision=config.precision, rngs=rngs)
        self.patch_size = config.patch_size

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, N, D) with N = (H / p) * (W / p)."""
        B, H, W, C = x.shape
        p = self.patch_size
        patches = x.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
        tokens = self.proj(patches.reshape(B, -1, p * p * C))
        return tokens + sincos_positions(tokens.shape[-1], H // p).astype(tokens.dtype)


def unpatchify(tokens: jax.Array, patch_size: int) -> jax.Array:
    """tokens: (B, N, p * p * C), each a patch with its channels fastest -> (B, H, W, C) square images."""
    B, N, features = tokens.shape
    p, side = patch_size, math.isqrt(N)
    patches = tokens.reshape(B, side, side, p, p, features // p**2)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(B, side * p, side * p, -1)


class TimestepEmbedder(nnx.Module):
    """Sinusoids of the timestep (Ho et al. 2020, app. B) through two linear layers."""

    num_frequencies = 256

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width, init = config.hidden_size, normal_002
        self.mlp = Mlp(self.num_frequencies, width, width, activation=nnx.silu, kernel_init=init, rngs=rngs)
        self.downscale_freq_shift = config.downscale_freq_shift

    def __call__(self, t: jax.Array) -> jax.Array:
        """t: (B,) timesteps in 0..999 -> (B, D) float32."""
        return self.mlp(timestep_embedding(t, self.num_frequencies, downscale_freq_shift=self.downscale_freq_shift))


def timestep_embedding(
    t: jax.Array, num_frequencies: int, max_period: float = 10000.0, downscale_freq_shift: int = 0
) -> jax.Array:
    """t: (B,) -> (B, num_frequencies) float32, cosines first, then sines, of t times falling frequencies."""
    half = num_frequencies // 2
    exponents = (
        -np.float32(np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half - downscale_freq_shift)
    )
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)  # float32's own exp is an ulp off, times 999
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LabelEmbedder(nnx.Module):
    """A learned vector a class, and one more for the null class if labels are dropped in training."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.embedding_table = nnx.Param(normal_002(rngs.params(), (config.label_rows, config.hidden_size)))

    def __call__(self, y: jax.Array) -> jax.Array:
        """y: (B,) labels -> (B, D) float32."""
        return self.embedding_table[...][y]


class ContextEmbedder(nnx.Module):
    """Condition tokens of any kind at the hidden width, each with its place in the sequence added."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.longest, self.features = config.context_tokens, config.context_features
        self.mlp = Mlp(self.features, config.hidden_size, config.hidden_size, activation=gelu_tanh, rngs=rngs)

    def __call__(self, B: int, context: jax.Array | None, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """context: (B, L, context_features), mask: (B, L) bool -> (B, L, D) float32, and the mask."""
        if context is None or context.shape == (B, 0, self.features):
            context, mask = jnp.zeros((B, 1, self.features)), jnp.zeros((B, 1), bool)
        mask = jnp.ones(context.shape[:2], bool) if mask is None else mask
        length = mask.shape[-1]
        if context.shape != (B, length, self.features) or mask.shape != (B, length) or length > self.longest:
            raise InputError(
                f"context has shape {context.shape} and its mask {mask.shape}; this DiT expects ({B}, L, "
                f"{self.features}) and ({B}, L), L at most {self.longest}"
            )
        tokens = self.mlp(context)
        return tokens + sincos_table(tokens.shape[-1], length).astype(np.float32), mask
