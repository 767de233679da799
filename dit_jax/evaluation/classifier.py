"""Train a small classifier of a data set, keep it in a file, and take features from it."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.checkpoints.tensor_files import SAFETENSORS, check_shapes, read_tensors, write_tensors
from dit_jax.data.sources import Source
from dit_jax.errors import InputError
from dit_jax.evaluation.images import labelled_images
from dit_jax.models.classifier import Classifier, ClassifierConfig, abstract_classifier
from dit_jax.parallel.chips import training_options

RECORD = "classifier"
"""Under this name the record in the file holds the config and what is known of the classifier."""

HELD_OUT = 4  # every fourth image of the data set is kept from training
STEPS, BATCH, LEARNING_RATE = 600, 128, 2e-3


def held_out(count: int) -> np.ndarray:
    """Indices of the images that a classifier of so many is not trained on."""
    return np.arange(HELD_OUT - 1, count, HELD_OUT)


def train_classifier(source: Source, image_size: int) -> tuple[ClassifierConfig, dict, float]:
    """(config, parameters, share of held-out images that it labels rightly) of a classifier of the data set.

    All images are held in memory. Raises InputError for one class, or too few images.
    """
    config = ClassifierConfig(image_size, source.channels, len(source.class_names))
    if config.num_classes < 2 or len(source) < HELD_OUT:
        raise InputError(f"{source!r} has {config.num_classes} classes and {len(source)} images: nothing to tell apart")
    images, labels = labelled_images(source, image_size)
    test = held_out(len(source))
    params = _fit(config, np.delete(images, test, axis=0), np.delete(labels, test))
    logits = apply_classifier(config, params, images[test])["logits"]
    return config, params, float((np.argmax(logits, axis=1) == labels[test]).mean())


def apply_classifier(config: ClassifierConfig, params: dict, images: jax.Array) -> dict[str, jax.Array]:
    """What `Classifier` gives with these parameters."""
    graph, _ = abstract_classifier(config)
    return nnx.merge(graph, params)(images)


def write_classifier(path: str | Path, config: ClassifierConfig, params: dict, about: dict[str, Any]) -> None:
    """Write a .safetensors file with the config and `about` in its metadata. Raises InputError for another suffix."""
    if Path(path).suffix != SAFETENSORS:
        raise InputError(f"{path}: a classifier is written as {SAFETENSORS}")
    tensors = {name: np.asarray(leaf) for name, leaf in _flat(params).items()}
    write_tensors(Path(path), tensors, {RECORD: {"config": dataclasses.asdict(config), **about}})


def read_classifier(path: str | Path) -> tuple[ClassifierConfig, dict, dict[str, Any]]:
    """(config, parameters, what is known of it) of a file that `write_classifier` made. Raises InputError."""
    path = Path(path)
    if path.suffix != SAFETENSORS:
        raise InputError(f"{path} is no classifier: expected a {SAFETENSORS} file of --make_classifier")
    tensors, record = read_tensors(path)
    if RECORD not in record:
        raise InputError(f"{path} is no classifier: python -m dit_jax.evaluate --make_classifier={path} makes one")
    try:
        about = dict(record[RECORD])
        config = ClassifierConfig(**about.pop("config"))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its record cannot be read: {error}") from error
    _, shapes = abstract_classifier(config)
    expected = {name: leaf.shape for name, leaf in _flat(shapes).items()}
    try:
        check_shapes(f"a {config}", expected, {name: array.shape for name, array in tensors.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    names = {".".join(map(str, path)): path for path in flatten_dict(shapes)}
    return config, unflatten_dict({names[name]: jnp.asarray(array) for name, array in tensors.items()}), about


def _flat(tree: dict) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def _fit(config: ClassifierConfig, images: np.ndarray, labels: np.ndarray) -> dict:
    """AdamW with a cosine decay; the same images give the same parameters."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, STEPS), weight_decay=1e-2)

    def loss(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply_classifier(config, params, images)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, compiler_options=training_options(jax.devices()[0]))
    def step(params: dict, moments: optax.OptState, images: jax.Array, labels: jax.Array) -> tuple:
        updates, moments = optimizer.update(jax.grad(loss)(params, images, labels), moments, params)
        return optax.apply_updates(params, updates), moments

    params = nnx.to_pure_dict(nnx.state(Classifier(config, rngs=nnx.Rngs(0)), nnx.Param))
    moments, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(len(images), size=BATCH)
        params, moments = step(params, moments, images[rows], labels[rows])
    return params
