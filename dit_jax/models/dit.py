"""Diffusion Transformers (Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748)."""

import math
from collections.abc import Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.attention import SelfAttention
from dit_jax.models.layers import Linear, Mlp, Modulation, gelu_tanh, modulated_norm, normal_002, zeros
from dit_jax.parallel.sharding import gather_parameters, shard_batch

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class DiT(nnx.Module):
    """The network: patches of a noised image, a timestep and a label -> the noise and, if learned, its variance.

    Module names are those of the PyTorch state dict. The parameters of the blocks are stacked on a leading depth
    axis and run by one scan. Parameters are float32; matrix products run in `config.compute_dtype`; normalisation,
    softmax, timestep embedding and modulation in float32. The output is exactly 0 at initialisation.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.x_embedder = PatchEmbed(config, rngs=rngs)
        self.t_embedder = TimestepEmbedder(config, rngs=rngs)
        self.y_embedder = LabelEmbedder(config, rngs=rngs)
        self.blocks = nnx.vmap(lambda rngs: DiTBlock(config, rngs=rngs))(rngs.split(config.depth))
        self.final_layer = FinalLayer(config, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        """One forward pass, deterministic.

        Args:
            x: (B, H, W, C) noised pixels or latents.
            t: (B,) timesteps in the units of training, 0..999, also when sampling with fewer steps.
            y: (B,) labels in [0, num_classes), or num_classes for the null class.

        Returns:
            (B, H, W, C) the predicted noise, or (B, H, W, 2C) with the variance's channels after it; float32.

        Raises InputError for an x of another size or number of channels than the config's.
        """
        size, channels = self.config.input_size, self.config.in_channels
        if x.shape[1:] != (size, size, channels):
            raise InputError(f"x has shape {x.shape}; this DiT expects (batch, {size}, {size}, {channels})")
        x_embedder, t_embedder, y_embedder = gather_parameters((self.x_embedder, self.t_embedder, self.y_embedder))
        c = shard_batch(t_embedder(t) + y_embedder(y))
        tokens = shard_batch(x_embedder(x))
        # The condition once for each block: without it XLA's CPU compiler transposes all weights of the product.
        conditions = jnp.broadcast_to(c, (self.config.depth, *c.shape))
        modulations = jax.vmap(lambda block, c: block.adaLN_modulation(c))(self.blocks, conditions)
        blocks = jax.tree.map(lambda parameter: parameter.astype(tokens.dtype), self.blocks)

        def layer(tokens, block_and_modulation):
            block, modulation = block_and_modulation
            return shard_batch(gather_parameters(block)(tokens, modulation)), None

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        tokens, _ = jax.lax.scan(layer, tokens, (blocks, modulations), unroll=self.config.unroll)
        return unpatchify(gather_parameters(self.final_layer)(tokens, c), self.config.patch_size)

    @classmethod
    def from_state_dict(cls, config: DiTConfig, state_dict: Mapping[str, np.ndarray]) -> "DiT":
        """A model with weights given under the official PyTorch names; see `checkpoints.torch_layout`."""
        from dit_jax.checkpoints import torch_layout  # the one arrow up: checkpoints/ knows models/

        return torch_layout.from_state_dict(config, state_dict)

    def to_state_dict(self) -> dict[str, np.ndarray]:
        """The weights under the official PyTorch names, `pos_embed` included."""
        from dit_jax.checkpoints import torch_layout

        return torch_layout.to_state_dict(self)


def abstract_dit(config: DiTConfig) -> tuple[nnx.GraphDef, dict]:
    """A DiT without its arrays, and the nested dict of their shapes: `nnx.merge` of the first with such a dict of
    arrays is the model. Nothing is computed."""
    graph, params = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graph, nnx.to_pure_dict(params)


class DiTBlock(nnx.Module):
    """Transformer block driven by its condition through adaLN-Zero (Peebles & Xie 2023, fig. 3)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.attn = SelfAttention(config, rngs=rngs)
        width = config.hidden_size
        self.mlp = Mlp(width, config.mlp_width, width, activation=gelu_tanh, dtype=config.compute_dtype, rngs=rngs)
        self.adaLN_modulation = Modulation(config.hidden_size, chunks=6, rngs=rngs)
        self.norm2_eps = config.norm2_eps

    def __call__(self, x: jax.Array, modulation: tuple[jax.Array, ...]) -> jax.Array:
        """x: (B, N, D) tokens, modulation: what `adaLN_modulation` makes of the condition, six (B, 1, D) ->
        (B, N, D) in the dtype of x."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = (x + gate_msa * self.attn(modulated_norm(x, shift_msa, scale_msa))).astype(x.dtype)
        return (x + gate_mlp * self.mlp(modulated_norm(x, shift_mlp, scale_mlp, self.norm2_eps))).astype(x.dtype)


class FinalLayer(nnx.Module):
    """Modulated LayerNorm and a linear map from tokens to the values of their patches."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.adaLN_modulation = Modulation(config.hidden_size, chunks=2, rngs=rngs)
        features = config.patch_size**2 * config.out_channels
        self.linear = Linear(config.hidden_size, features, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """x: (B, N, D), c: (B, D) -> (B, N, p * p * C_out) float32."""
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulated_norm(x, shift, scale))


class PatchEmbed(nnx.Module):
    """Non-overlapping p x p patches as tokens, row by row, each with its fixed position added."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        features = config.patch_size**2 * config.in_channels
        self.proj = Linear(features, config.hidden_size, dtype=config.compute_dtype, rngs=rngs)
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


@lru_cache
def sincos_positions(hidden_size: int, side: int) -> np.ndarray:
    """Fixed 2-D positions of a square of side x side patches -> (side * side, hidden_size) float32.

    The first half of the channels encodes the column, the second the row; each is [sin, cos] over falling
    frequencies (Vaswani et al. 2017, sec. 3.5, in two dimensions). Computed in float64.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** -(np.arange(quarter) / quarter)
    angles = np.arange(side)[:, None] * omega
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)
