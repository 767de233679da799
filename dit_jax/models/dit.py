"""Diffusion Transformers (Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748)."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import AttentionKind, DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.abstract import abstract
from dit_jax.models.attention import CrossAttention, SelfAttention
from dit_jax.models.embedders import ContextEmbedder, LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify
from dit_jax.models.kernels import KERNELS, Attend, attention_saveable
from dit_jax.models.layers import (
    STATISTICS,
    LearnedNorm,
    Linear,
    Mlp,
    Modulation,
    gelu_tanh,
    modulated_norm,
    plain_norm,
    zeros,
)
from dit_jax.models.local_attention import make_attend
from dit_jax.models.runs import Run, runs
from dit_jax.parallel.sharding import gather_parameters, settled, shard_batch

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": functools.reduce(
        jax.checkpoint_policies.save_from_both_policies,
        (
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(STATISTICS),
            attention_saveable,
        ),
    ),
}


class Conditions(NamedTuple):
    """What drives the blocks, the same for all of them."""

    c: jax.Array
    """(B, D) float32: timestep and label in one vector."""
    context: jax.Array | None
    """(B, L, D) tokens that blocks with cross-attention look at."""
    mask: jax.Array | None
    """(B, L) bool: which of them there are."""


class DiT(nnx.Module):
    """The network: patches of a noised image, a timestep and a label -> the noise and, if learned, its variance.

    Module names are those of the PyTorch state dict. The parameters of the blocks are stacked on a leading depth
    axis and run by one scan, or one for each kind of attention and number of heads; what a block with fewer heads than
    another has no use for is there, and 0 where it is multiplied. Parameters are float32; matrix products run in
    `config.precision`; normalisation, softmax, timestep embedding and modulation in float32. The output is exactly
    0 at initialisation.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.x_embedder = PatchEmbed(config, rngs=rngs)
        self.t_embedder = TimestepEmbedder(config, rngs=rngs)
        self.y_embedder = LabelEmbedder(config, rngs=rngs)
        self.context_embedder = ContextEmbedder(config, rngs=rngs) if config.context_features else None
        self.blocks = nnx.vmap(lambda rngs: DiTBlock(config, rngs=rngs))(rngs.split(config.depth))
        if config.heads_left:
            rows = np.repeat(config.head_exists, config.head_width, axis=1)
            self.blocks.attn.proj.kernel[...] *= rows[..., None].astype(np.float32)
        self.final_layer = FinalLayer(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> jax.Array:
        """One forward pass, deterministic.

        Args:
            x: (B, H, W, C) noised pixels or latents.
            t: (B,) timesteps in the units of training, 0..999, also when sampling with fewer steps.
            y: (B,) labels in [0, num_classes), or num_classes for the null class.
            context: (B, L, context_features) condition tokens, for a model that takes them; None is as good as none.
            context_mask: (B, L) bool, True where there is a token; None where all are.

        Returns:
            (B, H, W, C) the predicted noise, or (B, H, W, 2C) with the variance's channels after it; float32.

        Raises InputError for an x or a context of another size or number of channels than the config's.
        """
        return self.with_gates(x, t, y, context, context_mask)[0]

    def with_gates(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The same, and how far each head was open, the mean of its tokens: (depth, B, H), or None without gates.

        A head that a block does not have is shut.
        """
        tokens, conditions = self.embed(x, t, y, context, context_mask)
        stacked, gates = (self.blocks_in(tokens.dtype), self.modulations(conditions.c)), []
        for run in runs(self.config):
            tokens, opened = self.run_blocks(run, tokens, run.part_of(stacked, self.config.num_heads), conditions)
            gates.append(opened)
        return self.read_out(tokens, conditions.c), None if opened is None else jnp.concatenate(gates)

    def embed(
        self, x: jax.Array, t: jax.Array, y: jax.Array, context: jax.Array | None, context_mask: jax.Array | None
    ) -> tuple[jax.Array, Conditions]:
        """What the first block is given: (B, N, D) tokens, and the conditions; arguments are those of the network."""
        config, (B, size) = self.config, (len(x), self.config.input_size)
        if x.shape[1:] != (size, size, config.in_channels):
            raise InputError(f"x has shape {x.shape}; this DiT expects (batch, {size}, {size}, {config.in_channels})")
        if context is not None and not config.context_features:
            raise InputError("this DiT takes no context: config.model.context_features is 0")
        embedders = (self.x_embedder, self.t_embedder, self.y_embedder, self.context_embedder)
        x_embedder, t_embedder, y_embedder, context_embedder = gather_parameters(embedders)
        t_and_y = t_embedder(t), y_embedder(y)
        c = shard_batch(t_and_y[0] + t_and_y[1])
        tokens = shard_batch(x_embedder(x))
        seen = []  # (tokens, mask)
        if context_embedder is not None:
            seen.append(context_embedder(B, context, context_mask))
        if config.block == "cross-attention":
            seen.append((jnp.stack(t_and_y, axis=1), jnp.ones((B, 2), bool)))
        if config.block == "in-context":
            tokens = jnp.concatenate([tokens, *(e[:, None].astype(tokens.dtype) for e in t_and_y)], axis=1)
        if not seen:
            return tokens, Conditions(c, None, None)
        context, mask = (shard_batch(jnp.concatenate(parts, axis=1)) for parts in zip(*seen, strict=True))
        return tokens, Conditions(c, context.astype(tokens.dtype), mask)

    def blocks_in(self, dtype: jnp.dtype) -> "DiTBlock":
        """The stacked blocks with the parameters in the dtype that they compute in, but for those of `modulations`."""
        blocks = jax.tree.map(lambda parameter: parameter.astype(dtype), self.blocks)
        for name in ("adaLN_modulation", "norm1", "norm2"):
            setattr(blocks, name, getattr(self.blocks, name))
        return blocks

    def modulations(self, c: jax.Array) -> tuple[jax.Array, ...]:
        """c: (B, D) -> what `DiTBlock.modulation` makes of it for each block, stacked on the depth axis."""
        # The condition once for each block: without it XLA's CPU compiler transposes all weights of the product.
        conditions = jnp.broadcast_to(Modulation.activated(c), (self.config.depth, *c.shape))
        return jax.vmap(lambda block, c: block.modulation(c))(self.blocks, conditions)

    def run_blocks(
        self, run: Run, tokens: jax.Array, stacked: tuple["DiTBlock", tuple[jax.Array, ...]], conditions: Conditions
    ) -> tuple[jax.Array, jax.Array | None]:
        """tokens: (B, N, D), stacked: the blocks of the run and their modulations -> (B, N, D), and the gates
        (blocks, B, H) as in `with_gates`, by one scan."""
        config, remat = self.config, self.config.here.remat

        def make_layer(kind: AttentionKind, shifted: bool):
            attend = make_attend(kind, shifted, KERNELS[config.here.attention_kernel])

            def layer(tokens, block_and_modulation):
                block, modulation = block_and_modulation
                tokens, gates = gather_parameters(block)(tokens, modulation, conditions, attend)
                tokens = shard_batch(tokens)
                return (settled(tokens) if config.unroll > 1 else tokens), gates

            if remat == "none":
                return layer
            # In a loop the backward pass is another one, and needs no barrier to compute anything again.
            return jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=config.unroll > 1)

        layers = [make_layer(kind, shifted) for kind, shifted in run.kinds]

        def iteration(tokens, stacked):
            if len(layers) == 1:
                return layers[0](tokens, stacked)
            gates = []
            for i, layer in enumerate(layers):
                tokens, opened = layer(tokens, jax.tree.map(lambda leaf: leaf[i], stacked))  # noqa: B023
                gates.append(opened)
            return tokens, None if opened is None else jnp.stack(gates)

        tokens, gates = jax.lax.scan(iteration, tokens, stacked, unroll=max(1, config.unroll // len(layers)))
        if gates is None:
            return tokens, None
        gates = gates.reshape(-1, *gates.shape[-2:])
        return tokens, jnp.pad(gates, ((0, 0), (0, 0), (0, config.num_heads - run.heads)))

    def read_out(self, tokens: jax.Array, c: jax.Array) -> jax.Array:
        """(B, N, D) tokens of the last block and (B, D) condition -> (B, H, W, C_out)."""
        patches = gather_parameters(self.final_layer)(tokens[:, : self.config.tokens], c)
        return unpatchify(patches, self.config.patch_size)

    @classmethod
    def from_state_dict(cls, config: DiTConfig, state_dict: Mapping[str, np.ndarray]) -> "DiT":
        """A model with weights given under the official PyTorch names; see `checkpoints.torch_layout`."""
        from dit_jax.checkpoints import torch_layout  # the one arrow up: checkpoints/ knows models/

        return torch_layout.from_state_dict(config, state_dict)

    def to_state_dict(self) -> dict[str, np.ndarray]:
        """The weights under the official PyTorch names, `pos_embed` included."""
        from dit_jax.checkpoints import torch_layout

        return torch_layout.to_state_dict(self)


@functools.cache
def abstract_dit(config: DiTConfig) -> tuple[nnx.GraphDef, dict]:
    """A DiT without its arrays, and the nested dict of their shapes; see `abstract`. Both are shared by all who ask."""
    return abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))


class DiTBlock(nnx.Module):
    """Transformer block driven by its condition: adaLN-Zero, or another design of Peebles & Xie 2023, fig. 3."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.attn = SelfAttention(config, rngs=rngs)
        width = config.hidden_size
        self.mlp = Mlp(width, config.mlp_width, width, activation=gelu_tanh, precision=config.precision, rngs=rngs)
        self.norm2_eps = config.norm2_eps
        chunks = {"adaLN-Zero": 6, "adaLN": 4}.get(config.block)
        self.adaLN_modulation = Modulation(width, chunks, rngs=rngs) if chunks else None
        self.norm1 = None if chunks else LearnedNorm(width, rngs=rngs)
        self.norm2 = None if chunks else LearnedNorm(width, rngs=rngs)
        crossed = config.context_features or config.block == "cross-attention"
        self.cross_attn = CrossAttention(config, rngs=rngs) if crossed else None

    def modulation(self, c: jax.Array) -> tuple[jax.Array, ...]:
        """c: (B, D) as `Modulation.activated` leaves it -> shift, scale and gate of attention and MLP, six arrays that
        go with (B, N, D); float32."""
        adaptive = self.adaLN_modulation is not None
        parts = self.adaLN_modulation(c) if adaptive else (*self.norm1(), *self.norm2())
        if len(parts) == 6:
            return parts
        shift_msa, scale_msa, shift_mlp, scale_mlp = parts
        open_gate = jnp.ones((1, 1, 1))
        return shift_msa, scale_msa, open_gate, shift_mlp, scale_mlp, open_gate

    def __call__(
        self, x: jax.Array, modulation: tuple[jax.Array, ...], conditions: Conditions, attend: Attend
    ) -> tuple[jax.Array, jax.Array | None]:
        """x: (B, N, D) tokens, modulation: what `self.modulation` makes of the condition, attend: what computes
        self-attention -> (B, N, D) in the dtype of x, and the mean gates of the heads (B, H), or None."""
        attention, gates = self.attention(x, modulation, conditions.c, attend)
        x = (x + modulation[2] * attention).astype(x.dtype)
        if self.cross_attn is not None:
            x = (x + self.cross_attn(plain_norm(x), conditions.context, conditions.mask)).astype(x.dtype)
        x = (x + modulation[5] * self.feed_forward(x, modulation)).astype(x.dtype)
        return x, None if gates is None else gates.mean(axis=1)

    def attention(
        self, x: jax.Array, modulation: tuple[jax.Array, ...], c: jax.Array, attend: Attend
    ) -> tuple[jax.Array, jax.Array | None]:
        """What self-attention adds to x, before its adaLN gate: (B, N, D); and the gates of its heads."""
        shift_msa, scale_msa, *_ = modulation
        return self.attn(modulated_norm(x, shift_msa, scale_msa), c, attend)

    def feed_forward(self, x: jax.Array, modulation: tuple[jax.Array, ...]) -> jax.Array:
        """What the MLP adds to x, before its gate: (B, N, D)."""
        *_, shift_mlp, scale_mlp, _ = modulation
        return self.mlp(modulated_norm(x, shift_mlp, scale_mlp, self.norm2_eps))


class FinalLayer(nnx.Module):
    """Modulated LayerNorm and a linear map from tokens to the values of their patches."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        adaptive = config.block in ("adaLN-Zero", "adaLN")
        self.adaLN_modulation = Modulation(config.hidden_size, chunks=2, rngs=rngs) if adaptive else None
        self.norm = None if adaptive else LearnedNorm(config.hidden_size, rngs=rngs)
        features = config.patch_size**2 * config.out_channels
        self.linear = Linear(config.hidden_size, features, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """x: (B, N, D), c: (B, D) -> (B, N, p * p * C_out) float32."""
        shift, scale = self.norm() if self.adaLN_modulation is None else self.adaLN_modulation(Modulation.activated(c))
        return self.linear(modulated_norm(x, shift, scale))
