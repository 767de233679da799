"""Analytic cost of DiT, and of the autoencoder beside it."""

from dit_jax.config import DiTConfig, attention_layers
from dit_jax.models.autoencoder import AutoencoderConfig
from dit_jax.models.local_attention import scores_computed


def forward_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of one forward pass of one image: every matrix product, nothing else.

    Windows and neighbourhoods count as they are computed, with what their masks hide. The paper's "Gflops" are these,
    in units of 1e9.
    """
    patches, D, widths = config.tokens, config.hidden_size, [heads * config.head_width for heads in config.block_heads]
    patch_embed = patches * config.patch_size**2 * config.in_channels * D
    timestep_mlp = 256 * D + D * D
    context_mlp = config.context_tokens * (config.context_features + D) * D
    modulation = {"adaLN-Zero": 6, "adaLN": 4}.get(config.block, 0) * D * D  # once for each image
    final_layer = (2 * D * D if modulation else 0) + patches * D * config.patch_size**2 * config.out_channels

    N = patches + (2 if config.block == "in-context" else 0)
    gated = {"none": 0, "token": N, "condition": 1}[config.head_gate]
    context = config.context_tokens + (2 if config.block == "cross-attention" else 0)
    blocks = 0
    for kind, heads, width in zip(
        attention_layers(config.attention, config.depth), config.block_heads, widths, strict=True
    ):
        blocks += modulation + N * (4 * D * width + 2 * D * config.mlp_width) + gated * D * heads
        # A score's product with queries and keys, and the values'.
        blocks += 2 * width * (N * N if kind.name == "global" else scores_computed(kind, config.side))
        if context:
            blocks += 2 * D * width * (patches + context) + 2 * patches * context * width  # q, proj; kv; the scores
    return patch_embed + timestep_mlp + context_mlp + blocks + final_layer


def train_flops(config: DiTConfig) -> int:
    """FLOPs of training on one image: two a multiply-accumulate, forward once and backward twice, no recomputation."""
    return 3 * 2 * forward_macs(config)


def encoder_macs(config: AutoencoderConfig, side: int) -> int:
    """Multiply-accumulates of the moments of one image, `side` pixels high and wide: every product of convolutions,
    but those with the padding, and of attention."""
    before, moments = config.block_out_channels[0], 2 * config.latent_channels
    macs = config.in_channels * before * _taps(side)
    for i, width in enumerate(config.block_out_channels):
        if i > 0:
            side //= 2
            macs += before**2 * (3 * side - 1) ** 2  # padded at one end only
        macs += _residual(before, width, side) + (config.layers_per_block - 1) * _residual(width, width, side)
        before = width
    macs += _middle(config, side) + before * moments * _taps(side)
    return macs + (moments**2 * side**2 if config.use_quant_conv else 0)


def decoder_macs(config: AutoencoderConfig, side: int) -> int:
    """Multiply-accumulates of one image, `side` pixels high and wide, from its latents, counted likewise."""
    side, latents, before = side // config.downsample, config.latent_channels, config.block_out_channels[-1]
    macs = latents**2 * side**2 if config.use_post_quant_conv else 0
    macs += latents * before * _taps(side) + _middle(config, side)
    for i, width in enumerate(reversed(config.block_out_channels)):
        if i > 0:
            side *= 2
            macs += 4 * before**2 * side**2  # each pixel from the 2x2 smaller ones that are next to it
        macs += _residual(before, width, side) + config.layers_per_block * _residual(width, width, side)
        before = width
    return macs + before * config.out_channels * _taps(side)


def _residual(before: int, width: int, side: int) -> int:
    """Two convolutions, and a shortcut where the width changes."""
    shortcut = before * width * side**2 if before != width else 0
    return (before + width) * width * _taps(side) + shortcut


def _middle(config: AutoencoderConfig, side: int) -> int:
    width = config.block_out_channels[-1]
    attention = 4 * width**2 * side**2 + 2 * width * side**4 if config.mid_block_add_attention else 0
    return 2 * _residual(width, width, side) + attention


def _taps(side: int) -> int:
    """Of a 3x3 convolution that keeps the sides, all that fall on the image."""
    return (3 * side - 2) ** 2
