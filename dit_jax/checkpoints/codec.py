"""What stands between images and the network: an autoencoder, or nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.checkpoints import autoencoder_layout, files
from dit_jax.errors import InputError
from dit_jax.files import digest
from dit_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder
from dit_jax.models.decoding import decode_pixels, in_parts

MICRO_BATCH = 4  # images that a device decodes at once


class Codec(NamedTuple):
    """An autoencoder's weights and where they come from. Without one, the network sees pixels.

    The functions take the parameters apart, so that they are arguments of a compiled program and not constants in it.
    """

    name: str
    """A file, folder or published name; "identity" for none."""
    sha256: str
    config: AutoencoderConfig | None
    params: dict

    @property
    def downsample(self) -> int:
        """Pixels to a latent along a side."""
        return self.config.downsample if self.config else 1

    def moments(self, params: dict, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C) in [-1, 1] -> (B, h, w, 2c) mean and log-variance of the latents, not scaled."""
        if self.config is None:
            return jnp.concatenate([x, jnp.full_like(x, -30.0)], axis=-1)
        return self._model(params).moments(x)

    def decode(self, params: dict, z: jax.Array, finish: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array:
        """z: (B, h, w, c) as the network sees it -> (B, H, W, C) pixels, about within [-1, 1], or what `finish` makes.

        A few images at a time and each finished at once, so that memory hardly grows with B.
        """
        if self.config is None:
            return finish(z)
        model, size = self._model(params), MICRO_BATCH * max(1, jax.sharding.get_abstract_mesh().size)
        return in_parts(lambda z: finish(decode_pixels(model, z, size)), z, size)

    def channels(self, image_channels: int) -> int:
        """Channels of what the network sees."""
        return self.config.latent_channels if self.config else image_channels

    def about(self) -> dict[str, Any]:
        """What a data set or a checkpoint keeps, to find it again and to know how its latents are scaled."""
        scale = (self.config.scaling_factor, self.config.shift_factor) if self.config else (1.0, 0.0)
        return {"name": self.name, "sha256": self.sha256, "scaling_factor": scale[0], "shift_factor": scale[1]}

    def _model(self, params: dict):
        graph, _ = abstract_autoencoder(self.config)
        return nnx.merge(graph, params)


IDENTITY = Codec("identity", "", None, {})


def open_codec(name: str) -> Codec:
    """The autoencoder of a file, folder or published name, or IDENTITY. Raises InputError if there is none."""
    if name == IDENTITY.name:
        return IDENTITY
    path = files.find(name)
    config, params = autoencoder_layout.read_autoencoder(path)
    return Codec(str(Path(name).absolute()) if Path(name).exists() else name, digest(path), config, params)


def reopen_codec(about: dict[str, Any], flag: str) -> Codec:
    """The autoencoder that `Codec.about` tells of; `flag` is what names it otherwise.

    Raises InputError if it is no longer there, or has become another.
    """
    try:
        codec = open_codec(about["name"])
    except InputError as error:
        raise InputError(f"the autoencoder of these latents cannot be read: {error}; or say {flag}") from error
    if codec.sha256 != about["sha256"]:
        raise InputError(f"{about['name']} is not the autoencoder that made these latents: say {flag}")
    return codec
