"""The images that a network is watched on: of a data set, or drawn by the network itself."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax.checkpoints.codec import Codec
from dit_jax.checkpoints.record import Record
from dit_jax.config import DiTConfig
from dit_jax.data.latents import LatentSource
from dit_jax.data.sources import Source, open_source
from dit_jax.data.transforms import normalise, to_pixels
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.guidance import guided
from dit_jax.diffusion.samplers import ddim_sample, initial_noise
from dit_jax.errors import InputError
from dit_jax.models.dit import DiT

GENERATED = "generated"
DRAWN_AT_ONCE = 4


class Images(NamedTuple):
    """What the network sees once noise is added, and what is known of it."""

    x0: np.ndarray
    """(n, S, S, C) float32 pixels in [-1, 1], or scaled latents."""
    labels: np.ndarray
    """(n,) int32."""
    segments: np.ndarray | None
    """(n, patches) int32: 1 for bright patches, 0 for dark ones; None for latents."""

    def part(self, some: slice) -> "Images":
        return Images(*(None if array is None else array[some] for array in self))


class Chosen(NamedTuple):
    """Images, and where they come from in two sentences for the report."""

    images: Images
    origin: str
    novelty: str
    """Whether the network has seen them in training."""


def choose(
    given: str | None,
    trained_on: str,
    model: DiT,
    record: Record,
    codec: Codec | None,
    count: int,
    labels: list[int] | None,
) -> Chosen:
    """The images that were asked for: of the data set `given`, or drawn by the network if that is generated[:STEPS].

    By default those of the data set that the network was `trained_on`, if that is known ("" otherwise) and can be
    read, or else drawn ones. Raises InputError if there are none such.
    """
    source, unread = None, ""
    if not (given or trained_on or GENERATED).startswith(GENERATED):
        try:
            source = open_source(given or trained_on)
        except InputError as error:
            if given:
                raise
            unread = f" Those that it was trained on cannot be read ({error})."
    if source is None:
        steps = (given or GENERATED).removeprefix(GENERATED).removeprefix(":") or "20"
        if not (steps.isdecimal() and 0 < int(steps) <= record.diffusion["steps"]):
            raise InputError(f"--data={given}: expected a data set, or generated:STEPS with 1 step or more")
        origin = f"Images drawn by the network itself, by DDIM in {steps} steps.{unread}"
        return Chosen(generated(model, record, int(steps), count, labels), origin, "The network drew them itself.")
    images = from_source(source, record, codec, count, labels)
    seen = "The network was trained on all of that data" if given in (None, trained_on) else "It may have seen them"
    return Chosen(images, f"Images of {source!r}, drawn at random with a fixed seed.", f"{seen}.")


def from_source(source: Source, record: Record, codec: Codec | None, count: int, labels: list[int] | None) -> Images:
    """`count` images in an order that does not depend on it: a permutation with seed 0, without those of other labels.

    Of latents the posterior's mean; images for a network of latents are encoded by `codec`.
    Raises InputError if there are fewer, or they are not what the network takes.
    """
    config, found = record.model, []
    for index in np.random.default_rng(0).permutation(len(source)):
        item = source[int(index)]
        if labels is None or item["label"] in labels:
            found.append((_as_read(source, item, config, codec), item["label"]))
        if len(found) == count:
            break
    else:
        raise InputError(
            f"{source!r} holds {len(found)} such images; {count} were asked for: lower --count or --ablate"
        )
    x0 = np.stack([x for x, _ in found])
    if codec is not None and codec.config is not None and not isinstance(source, LatentSource):
        encode = jax.jit(partial(_encode, codec))
        x0 = np.concatenate([encode(codec.params, x[None]) for x in tqdm(x0, desc="encoding", unit="image")])
    if x0.shape[1:] != (config.input_size, config.input_size, config.in_channels):
        raise InputError(
            f"{source!r} gives inputs of shape {x0.shape[1:]}; the network takes side {config.input_size} and "
            f"{config.in_channels} channels: give other --data, or --data=generated"
        )
    given = np.array([label for _, label in found], np.int32)
    if config.num_classes == 1:
        given = np.zeros_like(given)
    if given.max() >= config.num_classes:
        raise InputError(f"{source!r} has more classes than the network's {config.num_classes}: give other --data")
    return Images(x0, given, _segments(x0, config) if config.in_channels in (1, 3) else None)


def generated(model: DiT, record: Record, steps: int, count: int, labels: list[int] | None) -> Images:
    """Images that the network draws: DDIM in `steps` steps, guided as the record says, image i by the key (0, i)."""
    config, sample = model.config, record.sample
    diffusion = GaussianDiffusion.create(respacing=str(steps), **record.diffusion)
    scale = sample["guidance"] if config.class_dropout_prob else 1
    given = np.resize(np.arange(config.num_classes) if labels is None else labels, count).astype(np.int32)
    shape = (config.input_size, config.input_size, config.in_channels)

    @jax.jit
    def draw(model: DiT, y: jax.Array, keys: jax.Array) -> jax.Array:
        denoise = guided(model, y, scale, sample["guidance_channels"] or None)
        x_T = initial_noise(keys, shape)
        return ddim_sample(diffusion, denoise, x_T, keys, clip_denoised=sample["clip_denoised"])

    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(np.arange(count))
    drawn = []
    with tqdm(desc="drawing", total=count, unit="image") as bar:
        for i in range(0, count, DRAWN_AT_ONCE):
            some = slice(i, i + DRAWN_AT_ONCE)
            drawn.append(np.asarray(draw(model, given[some], keys[some])))
            bar.update(len(drawn[-1]))
    x0 = np.concatenate(drawn)
    return Images(x0, given, _segments(x0, config) if config.in_channels in (1, 3) else None)


def noise_like(x0: np.ndarray) -> np.ndarray:
    """A draw for each image, by its index alone; the same at every timestep."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(1)))(np.arange(len(x0)))
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys))


def _as_read(source: Source, item: dict, config: DiTConfig, codec: Codec | None) -> np.ndarray:
    if isinstance(source, LatentSource):
        about, moments = source.metadata["autoencoder"], np.asarray(item["moments"][0], np.float32)
        return (moments[..., : source.channels] - about["shift_factor"]) * about["scaling_factor"]
    if codec is None:
        raise InputError(
            f"{source!r} holds images and the network takes latents of an autoencoder that is not known: give "
            "--autoencoder, or --data=latents:DIR or generated"
        )
    return normalise(to_pixels(item["image"], config.input_size * codec.downsample))


def _encode(codec: Codec, params: dict, x: jax.Array) -> jax.Array:
    mean, _ = jnp.split(codec.moments(params, x), 2, axis=-1)
    about = codec.about()
    return (mean - about["shift_factor"]) * about["scaling_factor"]


def _segments(x0: np.ndarray, config: DiTConfig) -> np.ndarray:
    """Bright and dark patches of each image, told apart at the threshold of Otsu (1979) on the means of its patches."""
    side, patch = config.side, config.patch_size
    means = x0.reshape(len(x0), side, patch, side, patch, -1).mean(axis=(2, 4, 5)).reshape(len(x0), -1)
    return np.stack([_otsu(image) for image in means])


def _otsu(values: np.ndarray) -> np.ndarray:
    """Two classes with the largest variance between them."""
    levels = np.unique(values)
    if len(levels) == 1:
        return np.zeros(len(values), np.int32)
    cuts = (levels[:-1] + levels[1:]) / 2
    between = [(a := values > cut).mean() * (~a).mean() * (values[a].mean() - values[~a].mean()) ** 2 for cut in cuts]
    return (values > cuts[int(np.argmax(between))]).astype(np.int32)
