"""A small convolutional classifier, whose features stand in for Inception's on data sets that it knows nothing of."""

import dataclasses
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.errors import InputError
from dit_jax.models.abstract import abstract


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The network."""

    image_size: int
    """Side of the square images, pixels."""
    channels: int
    """Of the images: 1 for grey, 3 for colour."""
    num_classes: int
    width: int = 32
    """Channels of the convolutions."""
    features: int = 64
    """Width of the layer before the logits."""

    @property
    def halvings(self) -> int:
        """Convolutions that halve the side, down to 4 pixels or fewer."""
        return max(1, math.ceil(math.log2(self.image_size / 4)))


class Classifier(nnx.Module):
    """Convolutions that halve the side one after the other, then a layer of features, then logits; all float32."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = [config.channels, *[config.width] * (1 + config.halvings)]
        self.convolutions = nnx.List(
            nnx.Conv(before, after, (3, 3), strides=1 if i == 0 else 2, rngs=rngs)
            for i, (before, after) in enumerate(pairwise(widths))
        )
        side = -(-config.image_size // 2**config.halvings)
        self.features = nnx.Linear(side * side * config.width, config.features, rngs=rngs)
        self.logits = nnx.Linear(config.features, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """images: (B, H, W, C) uint8 -> {"pool": (B, features), "logits": (B, num_classes)}.

        Raises InputError for pictures of another shape.
        """
        size, channels = self.config.image_size, self.config.channels
        if images.shape[1:] != (size, size, channels) or images.dtype != jnp.uint8:
            raise InputError(
                f"images of shape {images.shape}, {images.dtype}: this classifier expects "
                f"(batch, {size}, {size}, {channels}) uint8"
            )
        with jax.default_matmul_precision("float32"):
            x = images.astype(jnp.float32) / 127.5 - 1
            for convolution in self.convolutions:
                x = nnx.relu(convolution(x))
            features = nnx.relu(self.features(x.reshape(len(x), -1)))
            return {"pool": features, "logits": self.logits(features)}


def abstract_classifier(config: ClassifierConfig) -> tuple[nnx.GraphDef, dict]:
    """A classifier without its arrays, and the nested dict of their shapes; see `abstract`."""
    return abstract(lambda: Classifier(config, rngs=nnx.Rngs(0)))
