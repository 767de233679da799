"""From a batch as it is read to what the network is trained on: pixels, latents from disk, or images encoded anew."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dit_jax.checkpoints.codec import IDENTITY, Codec, open_codec, reopen_codec
from dit_jax.config import DiTConfig
from dit_jax.data.latents import LatentSource
from dit_jax.data.sources import Source
from dit_jax.data.words import Words, open_context
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import sample_posterior, to_latents
from dit_jax.parallel.sharding import shard_batch
from dit_jax.training.encoding import moments_shape
from dit_jax.training.step import Prepare, as_read


class Inputs(NamedTuple):
    """What the step does with a batch before it adds noise."""

    prepare: Prepare
    """(frozen, key, x as read) -> x0 (B, H, W, C); everything random in it comes from the key."""
    frozen: dict
    """Weights that it needs and nobody trains."""
    shape: tuple[int, int, int]
    """(H, W, C) of x0."""
    image_size: int
    """Side of the images that the loader makes, pixels; of no meaning for latents."""
    flip: bool
    """Whether the loader flips; the step does it where both images are there."""
    codec: Codec | None
    """What decodes previews and samples to measure; None if it is not here and not needed."""
    autoencoder: dict[str, Any]
    """`Codec.about` of it, for checkpoints."""
    context: Words | None
    """What tells the model of an image beside its label, if anything."""


def open_inputs(config: ConfigDict, source: Source) -> Inputs:
    """How this run gets its x0. Raises InputError if settings and source do not go together."""
    if config.latents not in ("", "on_the_fly"):
        raise InputError(f"latents={config.latents!r}: expected on_the_fly, or nothing")
    flip, size = config.data.flip, config.model.input_size
    context = open_context(config.context, source.class_names, DiTConfig(**config.model))
    if isinstance(source, LatentSource):
        if config.latents:
            raise InputError(f"{source!r} holds latents, and latents={config.latents!r} encodes images: choose one")
        about, shape = source.metadata["autoencoder"], source.metadata["shape"][1:3]
        codec = open_decoder(config.autoencoder, about) if config.preview.every or config.eval.every else None
        return Inputs(choose_and_draw(about, flip), {}, (*shape, source.channels), size, False, codec, about, context)
    if not config.latents:
        return Inputs(as_read, {}, (size, size, source.channels), size, flip, IDENTITY, IDENTITY.about(), context)
    if not config.autoencoder:
        raise InputError("latents='on_the_fly' needs config.autoencoder: a file, folder, or fetched name")
    codec = open_codec(config.autoencoder)
    image_size = size * codec.downsample
    _, height, width, moments = moments_shape(codec, image_size, source.channels)
    shape = (height, width, moments // 2)
    return Inputs(encode_and_draw(codec), codec.params, shape, image_size, flip, codec, codec.about(), context)


def open_decoder(given: str, about: dict[str, Any]) -> Codec:
    """What decodes previews: the autoencoder that was given, or the one that made the latents."""
    return open_codec(given) if given else reopen_codec(about, "--config.autoencoder")


def choose_and_draw(about: dict[str, Any], flip: bool) -> Prepare:
    """moments (B, 2, h, w, 2C) of images and their mirror images -> latents of one of the two, by chance."""

    def prepare(_, key: jax.Array, moments: jax.Array) -> jax.Array:
        flip_key, noise_key = jax.random.split(key)
        mirrored = jax.random.bernoulli(flip_key, 0.5 if flip else 0.0, (len(moments), 1, 1, 1))
        chosen = jnp.where(mirrored, moments[:, 1], moments[:, 0]).astype(jnp.float32)
        return drawn(chosen, noise_key, about)

    return prepare


def encode_and_draw(codec: Codec) -> Prepare:
    """x (B, S, S, C) pixels -> latents."""

    def prepare(frozen: dict, key: jax.Array, x: jax.Array) -> jax.Array:
        return drawn(codec.moments(frozen, x), key, codec.about())

    return prepare


def drawn(moments: jax.Array, key: jax.Array, about: dict[str, Any]) -> jax.Array:
    """Latents of about unit variance from the posterior (Kingma & Welling 2013, sec. 2.4)."""
    noise = shard_batch(jax.random.normal(key, (*moments.shape[:-1], moments.shape[-1] // 2)))
    return to_latents(sample_posterior(moments, noise), about["scaling_factor"], about["shift_factor"])
