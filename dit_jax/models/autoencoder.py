"""The autoencoder between pixels and latents (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1), as diffusers has it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.errors import InputError
from dit_jax.models.abstract import abstract
from dit_jax.models.kernels import dot_product_attention
from dit_jax.models.layers import Linear
from dit_jax.models.products import float32_products

lecun_uniform = nnx.initializers.lecun_uniform()


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The network and the scale of its latents. Defaults are those of Stable Diffusion's, which DiT uses.

    Raises InputError, when made, if the numbers do not go together.
    """

    in_channels: int = 3
    """Channels of the image that is encoded."""
    out_channels: int = 3
    """Channels of the image that is decoded."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Widths of the blocks, from the pixels to the latents; between each two the side is halved."""
    layers_per_block: int = 2
    """Residual blocks at each width of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm; divides every width."""
    scaling_factor: float = 0.18215
    """Brings the latents to unit variance: a diffusion model sees (z - shift_factor) * scaling_factor."""
    shift_factor: float = 0.0
    """Mean of the latents, taken off before they are scaled."""
    use_quant_conv: bool = True
    """Whether a 1x1 convolution ends the encoder."""
    use_post_quant_conv: bool = True
    """Whether a 1x1 convolution begins the decoder."""
    mid_block_add_attention: bool = True
    """Whether the latents attend to each other in the middle of the encoder and of the decoder."""

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))  # JSON gives lists
        for count in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if getattr(self, count) < 1:
                raise InputError(f"{count}={getattr(self, count)}: expected at least 1")
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not widths or any(width < 1 or width % groups for width in widths):
            raise InputError(f"block_out_channels={widths}: expected multiples of norm_num_groups={groups}")
        if self.scaling_factor == 0:
            raise InputError("scaling_factor=0: expected the inverse of the latents' standard deviation")

    @property
    def downsample(self) -> int:
        """Pixels to a latent along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderKL(nnx.Module):
    """Images to the posterior of their latents (Kingma & Welling 2013, arXiv 1312.6114), and latents to images.

    Module names are those of diffusers' state dict. Everything is float32, products too (see `float32_products`):
    bfloat16 shows as bands.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = Conv(channels, channels, 1, rngs=rngs) if config.use_post_quant_conv else None

    def moments(self, x: jax.Array) -> jax.Array:
        """The posterior of an image's latents, for `sample_posterior`: means, then log-variances, not scaled.

        x: (B, H, W, in_channels) pixels in [-1, 1] -> (B, H / downsample, W / downsample, 2 * latent_channels).
        Raises InputError for another number of channels, or sides that are not multiples of `config.downsample`.
        """
        step, channels = self.config.downsample, self.config.in_channels
        if x.ndim != 4 or x.shape[1] % step or x.shape[2] % step or x.shape[3] != channels:
            expected = f"(batch, height, width, {channels}), height and width multiples of {step}"
            raise InputError(f"x has shape {x.shape}; this autoencoder expects {expected}")
        with float32_products():
            moments = self.encoder(x.astype(jnp.float32))
            return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, z: jax.Array) -> jax.Array:
        """The image of latents as the encoder gives them; a diffusion model's go through `from_latents` first.

        z: (B, h, w, latent_channels) -> (B, h * downsample, w * downsample, out_channels) pixels, about within [-1, 1].
        Raises InputError for another number of channels.
        """
        channels = self.config.latent_channels
        if z.ndim != 4 or z.shape[3] != channels:
            raise InputError(f"z has shape {z.shape}; this autoencoder expects (batch, height, width, {channels})")
        with float32_products():
            z = z.astype(jnp.float32)
            return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    @classmethod
    def from_state_dict(cls, config: AutoencoderConfig, state_dict: Mapping[str, np.ndarray]) -> "AutoencoderKL":
        """An autoencoder with weights given under diffusers' names; see `checkpoints.autoencoder_layout`."""
        from dit_jax.checkpoints import autoencoder_layout  # the one arrow up: checkpoints/ knows models/

        return autoencoder_layout.from_state_dict(config, state_dict)

    def to_state_dict(self) -> dict[str, np.ndarray]:
        """The weights under diffusers' names."""
        from dit_jax.checkpoints import autoencoder_layout

        return autoencoder_layout.to_state_dict(self)


@functools.cache
def abstract_autoencoder(config: AutoencoderConfig) -> tuple[nnx.GraphDef, dict]:
    """An autoencoder without its arrays, and the nested dict of their shapes; see `abstract`. Both are shared by all
    who ask."""
    return abstract(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))


class Encoder(nnx.Module):
    """Image to moments: residual blocks at falling sides, then attention between the latents."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], 3, rngs=rngs)
        self.down_blocks = nnx.List(DownBlock(config, i, rngs=rngs) for i in range(len(widths)))
        self.mid_block = MidBlock(config, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, in_channels) -> (B, h, w, 2 * latent_channels)."""
        x = through(self.conv_in(x), *self.down_blocks, self.mid_block)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents to image: attention between the latents, then residual blocks at growing sides."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = Conv(config.latent_channels, widths[-1], 3, rngs=rngs)
        self.mid_block = MidBlock(config, rngs=rngs)
        self.up_blocks = nnx.List(UpBlock(config, i, rngs=rngs) for i in range(len(widths)))
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups)
        self.conv_out = Conv(widths[0], config.out_channels, 3, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        """z: (B, h, w, latent_channels) -> (B, H, W, out_channels)."""
        x = through(self.conv_in(z), self.mid_block, *self.up_blocks)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class DownBlock(nnx.Module):
    """The encoder's residual blocks of its i-th width, then half the side, unless it is the last."""

    def __init__(self, config: AutoencoderConfig, i: int, *, rngs: nnx.Rngs):
        before, (width, *after) = config.block_out_channels[max(i - 1, 0)], config.block_out_channels[i:]
        inputs = [before] + [width] * (config.layers_per_block - 1)
        self.resnets = nnx.List(ResidualBlock(config, channels, width, rngs=rngs) for channels in inputs)
        self.downsamplers = nnx.List([Downsample(width, rngs=rngs)] if after else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, H / 2, W / 2, width), or the same H and W if last."""
        return through(x, *self.resnets, *self.downsamplers)


class UpBlock(nnx.Module):
    """The decoder's residual blocks of its i-th width, then twice the side, unless it is the last."""

    def __init__(self, config: AutoencoderConfig, i: int, *, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        before, (width, *after) = widths[max(i - 1, 0)], widths[i:]
        inputs = [before] + [width] * config.layers_per_block
        self.resnets = nnx.List(ResidualBlock(config, channels, width, rngs=rngs) for channels in inputs)
        self.upsamplers = nnx.List([Upsample(width, rngs=rngs)] if after else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, 2H, 2W, width), or the same H and W if last."""
        return through(x, *self.resnets, *self.upsamplers)


class MidBlock(nnx.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        width, attention = config.block_out_channels[-1], config.mid_block_add_attention
        self.resnets = nnx.List(ResidualBlock(config, width, width, rngs=rngs) for _ in range(2))
        self.attentions = nnx.List([Attention(config, width, rngs=rngs)] if attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, h, w, width) -> the same shape."""
        first, second = self.resnets
        return through(x, first, *self.attentions, second)


def through(x: jax.Array, *layers: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """x through one layer after the other."""
    for layer in layers:
        x = layer(x)
    return x


class ResidualBlock(nnx.Module):
    """Two normalised convolutions beside a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, config: AutoencoderConfig, before: int, width: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(before, config.norm_num_groups)
        self.conv1 = Conv(before, width, 3, rngs=rngs)
        self.norm2 = GroupNorm(width, config.norm_num_groups)
        self.conv2 = Conv(width, width, 3, rngs=rngs)
        self.conv_shortcut = Conv(before, width, 1, rngs=rngs) if before != width else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, before) -> (B, H, W, width)."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Every latent attends to every latent, with one head as wide as they are."""

    def __init__(self, config: AutoencoderConfig, width: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(width, config.norm_num_groups)
        self.to_q, self.to_k, self.to_v = (Linear(width, width, rngs=rngs) for _ in range(3))
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, h, w, width) -> the same shape."""
        B, h, w, width = x.shape
        tokens = self.group_norm(x).reshape(B, 1, h * w, width)
        out = dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(x.shape)


class Downsample(nnx.Module):
    """Half the side: a 3x3 convolution at every second pixel, padded at the right and the bottom only."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, H / 2, W / 2, C)."""
        return convolve(x, self.conv.kernel[...], stride=2, padding=(0, 1)) + self.conv.bias[...]


class Upsample(nnx.Module):
    """Twice the side: every pixel four times, then a 3x3 convolution.

    Among repeated pixels three taps fall on two pixels, so a 2x2 convolution of the small image gives each of the four
    kinds of pixel, with 4/9 of the products (Shi et al. 2016, arXiv 1609.07009).
    """

    # [row, tap, k]: the taps k of the 3x3 convolution that fall on the upper and the lower pixel of the 2x2, for the
    # lower of the two rows made of one pixel, which comes first, and for the upper one made of the next.
    FOLD = np.array([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], np.float32)

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, 2H, 2W, C)."""
        B, H, W, C = x.shape
        kernel = jnp.einsum("pik,qjl,klcd->ijcpqd", self.FOLD, self.FOLD, self.conv.kernel[...])
        kinds = convolve(x, kernel.reshape(2, 2, C, 4 * C), padding=(1, 1)).reshape(B, H + 1, W + 1, 2, 2, C)
        image = kinds.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H + 2, 2 * W + 2, C)
        return image[:, 1:-1, 1:-1] + self.conv.bias[...]


class Conv(nnx.Module):
    """Convolution with a bias that keeps the sides."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(lecun_uniform(rngs.params(), (size, size, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, in_channels) -> (B, H, W, out_channels)."""
        margin = self.kernel.shape[0] // 2
        return convolve(x, self.kernel[...], padding=(margin, margin)) + self.bias[...]


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: tuple[int, int]) -> jax.Array:
    """x: (B, H, W, C), kernel: (k, k, C, D), padding before and after each side -> (B, H', W', D)."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (padding, padding), dimension_numbers=layout)


class GroupNorm(nnx.Module):
    """Each image's groups of channels to mean 0 and variance 1, then an affine map (Wu & He 2018, eq. 1)."""

    def __init__(self, channels: int, groups: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> the same shape."""
        x = x - self.group_mean(x)
        return x * (jax.lax.rsqrt(self.group_mean(jnp.square(x)) + 1e-6) * self.scale[...]) + self.bias[...]

    def group_mean(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, 1, 1, C). Pixels first: splitting the channels before would copy the image."""
        B, _, _, C = x.shape
        means = x.mean((1, 2)).reshape(B, self.groups, -1).mean(-1)
        return jnp.repeat(means, C // self.groups, axis=-1)[:, None, None]


def sample_posterior(moments: jax.Array, noise: jax.Array) -> jax.Array:
    """A draw of the posterior (Kingma & Welling 2013, sec. 2.4): mean + standard deviation * noise.

    moments: (B, h, w, 2C) as `AutoencoderKL.moments` gives them, noise: (B, h, w, C) standard normal -> (B, h, w, C).
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, -30, 20)) * noise


def to_latents(z: jax.Array, scaling_factor: float, shift_factor: float) -> jax.Array:
    """What a diffusion model works on, of unit variance, from what the encoder gives."""
    return (z - shift_factor) * scaling_factor


def from_latents(x: jax.Array, scaling_factor: float, shift_factor: float) -> jax.Array:
    """What the decoder takes, from what a diffusion model works on."""
    return x / scaling_factor + shift_factor
