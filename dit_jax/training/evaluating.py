"""Evaluation while training: a few samples of the averaged weights against a reference, every so many steps."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dit_jax.checkpoints.codec import IDENTITY, Codec
from dit_jax.config import DiTConfig
from dit_jax.data.words import Words
from dit_jax.errors import InputError
from dit_jax.evaluation.comparison import make_comparison
from dit_jax.evaluation.images import require_enough
from dit_jax.sampling.generate import Generate, image_keys, in_batches, make_generate

Evaluation = Callable[[dict], Mapping[str, float]]


def make_evaluation(
    config: ConfigDict, mesh: Mesh, codec: Codec | None, context: Words | None = None
) -> Evaluation | None:
    """A function from weights to figures, such as `eval/fid_1000` of 1,000 images; None if none are asked for.

    The images are drawn as `config.sample` says, from the same noise each time, image i from the seed and i alone; as
    many of each class, named by its phrases in turn if the model takes words. The reference is measured here, once.
    Raises InputError if it cannot be, or its pictures are not like those that the model draws.
    """
    settings = config.eval
    if not settings.every:
        return None
    for name in ("reference", "features"):
        if not settings[name]:
            raise InputError(f"eval.every={settings.every} needs config.eval.{name}")
    require_enough(settings.count, "config.eval.count")
    model, codec = DiTConfig(**config.model), codec or IDENTITY
    classes = len(context.phrases) if context else model.num_classes
    side = model.input_size * codec.downsample
    channels = codec.config.out_channels if codec.config else model.in_channels
    batch = mesh.size * -(-settings.batch // mesh.size)
    figures_of = make_comparison(settings.features, settings.reference, (side, side, channels), mesh, batch)
    generate = make_generate(model, config.diffusion, codec, **config.sample)

    labels = np.random.default_rng(config.seed).permutation(np.arange(settings.count) * classes // settings.count)
    told = context.tokens(context.in_turn(labels)) if context else ()

    def evaluate(params: dict) -> Mapping[str, float]:
        images = draw(generate, params, labels, told, config.seed, batch)
        return {f"eval/{name}_{settings.count}": value for name, value in figures_of(images).items()}

    return evaluate


def draw(
    generate: Generate, params: dict, labels: np.ndarray, context: Sequence[np.ndarray], seed: int, batch: int
) -> np.ndarray:
    """(count, H, W, C) uint8 of so many labels (count,), and condition tokens and mask if any, `batch` at a time."""
    count = len(labels)
    padded = [in_batches(rows, batch) for rows in (labels.astype(np.int32), *context)]
    drawn = []
    for i in range(0, len(padded[0]), batch):
        y, *told = (rows[i : i + batch] for rows in padded)
        drawn.append(np.asarray(generate(params, y, image_keys(seed, i, batch), *told)))
    return np.concatenate(drawn)[:count]
