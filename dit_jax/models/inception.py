"""The Inception-v3 of 2015-12-05 that FID is defined by (Szegedy et al. 2015, arXiv 1512.00567; Heusel et al. 2017).

It is not the network of the paper: average pools leave the padding out of their means, the last block has a maximum in
the place of its average, and there are 1,008 classes.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.errors import InputError
from dit_jax.models.abstract import abstract

SIDE = 299  # pixels, of what the network sees
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1: 17 x 17 x 7 = 2,023 features

Pool = Callable[[jax.Array], jax.Array]


class InceptionV3(nnx.Module):
    """Pictures to the features of FID, of sFID (Nash et al. 2021), and the logits of the Inception Score.

    Module names are those of the PyTorch state dict. Everything is float32, products too. The weights come from
    `from_state_dict`; made anew they are zero.
    """

    def __init__(self):
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3, padding="VALID")
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3, padding="VALID")
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average_pool)
        self.Mixed_7c = InceptionE(2048, max_pool)
        self.fc = FullyConnected(2048, 1008)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """images: (B, H, W, 3) uint8 -> float32 pool (B, 2048), spatial (B, 2023) and logits_unbiased (B, 1008).

        The logits lack the bias, as the Inception Score wants them. Raises InputError for other pictures.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise InputError(
                f"images of shape {images.shape}, {images.dtype}: Inception expects (batch, height, width, 3) uint8"
            )
        with jax.default_matmul_precision("float32"):
            x = (resize(images.astype(jnp.float32), SIDE, SIDE) - 128) / 128
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halving_pool(x))))
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
            spatial = self.Mixed_6d.branch1x1(x)[..., :SPATIAL_CHANNELS]  # XLA computes it once
            x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
            pool = self.Mixed_7c(self.Mixed_7b(x)).mean((1, 2))
            return {
                "pool": pool,
                "spatial": spatial.reshape(len(images), -1),
                "logits_unbiased": pool @ self.fc.kernel[...],
            }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, np.ndarray]) -> "InceptionV3":
        """The network with weights under PyTorch's names; see `checkpoints.inception_layout`."""
        from dit_jax.checkpoints import inception_layout  # the one arrow up: checkpoints/ knows models/

        return inception_layout.from_state_dict(state_dict)


def abstract_inception() -> tuple[nnx.GraphDef, dict]:
    """The network without its arrays, and the nested dict of their shapes; see `abstract`."""
    return abstract(InceptionV3)


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear as TensorFlow 1 does it: pixel i is taken at i * in / out, corners aligned and nothing smoothed.

    x: (B, H, W, C) float32 -> (B, height, width, C).
    """
    top, bottom, down = source_pixels(x.shape[1], height)
    left, right, across = source_pixels(x.shape[2], width)
    rows = lerp(x[:, :, left], x[:, :, right], across[:, None])
    return lerp(rows[:, top], rows[:, bottom], down[:, None, None])


def source_pixels(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two old pixels that each new one lies between, and how far it is from the first, (new_size,) float32."""
    place = np.arange(new_size, dtype=np.float32) * (np.float32(size) / np.float32(new_size))
    first = np.minimum(place.astype(np.int32), size - 1)
    return first, np.minimum(first + 1, size - 1), place - first.astype(np.float32)


def lerp(a: jax.Array, b: jax.Array, weight: np.ndarray) -> jax.Array:
    return a + (b - a) * weight


class BasicConv2d(nnx.Module):
    """Convolution without a bias, normalisation by the training set's statistics, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, size: int | tuple[int, int], stride: int = 1, padding: str = "SAME"
    ):
        height, width = (size, size) if isinstance(size, int) else size
        self.conv = Convolution((height, width, in_channels, out_channels))
        self.bn = BatchNorm(out_channels)
        self.stride, self.padding = stride, "VALID" if stride > 1 else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, in_channels) -> (B, H', W', out_channels)."""
        x = jax.lax.conv_general_dilated(
            x,
            self.conv.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nnx.relu(self.bn(x))


class Convolution(nnx.Module):
    def __init__(self, shape: tuple[int, ...]):
        self.kernel = nnx.Param(jnp.zeros(shape))


class BatchNorm(nnx.Module):
    """Ioffe & Szegedy 2015, algorithm 2, with the statistics of training; epsilon 1e-3."""

    def __init__(self, channels: int):
        self.scale, self.bias, self.mean, self.var = (nnx.Param(jnp.zeros(channels)) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, channels) -> the same shape."""
        return (x - self.mean[...]) * (jax.lax.rsqrt(self.var[...] + 1e-3) * self.scale[...]) + self.bias[...]


class FullyConnected(nnx.Module):
    def __init__(self, features: int, classes: int):
        self.kernel = nnx.Param(jnp.zeros((features, classes)))
        self.bias = nnx.Param(jnp.zeros(classes))


class InceptionA(nnx.Module):
    """35 x 35: convolutions of 1x1, 5x5 and twice 3x3 beside a pool (fig. 5)."""

    def __init__(self, in_channels: int, pool_channels: int):
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3)
        self.branch_pool = BasicConv2d(in_channels, pool_channels, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, H, W, 224 + pool_channels)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return join(self.branch1x1(x), five, double, self.branch_pool(average_pool(x)))


class InceptionB(nnx.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, in_channels: int):
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, (H - 1) / 2, (W - 1) / 2, C + 480)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return join(self.branch3x3(x), double, halving_pool(x))


class InceptionC(nnx.Module):
    """17 x 17: convolutions of 7x7 and twice 7x7, as rows and columns, beside a pool (fig. 6)."""

    def __init__(self, in_channels: int, width: int):
        row, column = (1, 7), (7, 1)
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, width, 1)
        self.branch7x7_2 = BasicConv2d(width, width, row)
        self.branch7x7_3 = BasicConv2d(width, 192, column)
        self.branch7x7dbl_1 = BasicConv2d(in_channels, width, 1)
        self.branch7x7dbl_2 = BasicConv2d(width, width, column)
        self.branch7x7dbl_3 = BasicConv2d(width, width, row)
        self.branch7x7dbl_4 = BasicConv2d(width, width, column)
        self.branch7x7dbl_5 = BasicConv2d(width, 192, row)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, H, W, 768)."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return join(self.branch1x1(x), seven, double, self.branch_pool(average_pool(x)))


class InceptionD(nnx.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, in_channels: int):
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, (H - 1) / 2, (W - 1) / 2, C + 512)."""
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return join(three, self.branch7x7x3_4(seven), halving_pool(x))


class InceptionE(nnx.Module):
    """8 x 8: convolutions of 3x3 and twice 3x3, whose ends are a row beside a column, beside a pool (fig. 7)."""

    def __init__(self, in_channels: int, pool: Pool):
        row, column = (1, 3), (3, 1)
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, row)
        self.branch3x3_2b = BasicConv2d(384, 384, column)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, column)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) -> (B, H, W, 2048)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return join(
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )


def join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def halving_pool(x: jax.Array) -> jax.Array:
    """The largest of 3x3, at every second pixel. x: (B, H, W, C) -> (B, (H - 1) / 2, (W - 1) / 2, C)."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3x3. x: (B, H, W, C) -> the same shape."""
    return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")


def average_pool(x: jax.Array) -> jax.Array:
    """The mean of those of 3x3 pixels that are within the image. x: (B, H, W, C) -> the same shape."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)
