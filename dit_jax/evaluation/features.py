"""Features of many pictures, from Inception or from a classifier, over all devices and processes."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dit_jax.checkpoints.files import find
from dit_jax.checkpoints.inception_layout import read_inception
from dit_jax.errors import InputError
from dit_jax.evaluation.classifier import apply_classifier, read_classifier
from dit_jax.evaluation.images import ReadImages
from dit_jax.evaluation.statistics import Moments
from dit_jax.files import digest
from dit_jax.models.inception import abstract_inception
from dit_jax.parallel import processes
from dit_jax.parallel.sharding import batch_sharding

CLASSIFIER = "classifier:"


class Network(NamedTuple):
    """What features are taken from."""

    kind: str
    """"inception" or "classifier"."""
    path: str
    sha256: str
    known: dict[str, Any]
    """What else its file says of it."""
    params: dict
    apply: Callable[[dict, jax.Array], Mapping[str, jax.Array]]
    """(params, (B, H, W, C) uint8) -> "pool" (B, D), "logits" (B, classes) and, of Inception, "spatial" (B, 2023)."""
    spaces: tuple[str, ...]
    """Those of its outputs that are features."""
    size: tuple[int, int] | None
    """(H, W) of the pictures that it takes; None for any."""
    channels: int

    def about(self) -> dict[str, Any]:
        """For reports and reference files."""
        return {"kind": self.kind, "path": self.path, "sha256": self.sha256, **self.known}

    def require(self, size: tuple[int, ...], name: str) -> None:
        """Raise InputError, calling the pictures `name`, unless their size (H, W, C) suits the network."""
        kinds = {1: "grey", 3: "colour"}
        if size[2] != self.channels:
            instead = "" if self.kind == CLASSIFIER[:-1] else "; for small data sets say --features=classifier:PATH"
            raise InputError(
                f"{name} holds {kinds[size[2]]} pictures; the {self.kind} {self.path} takes {kinds[self.channels]} "
                f"ones{instead}"
            )
        if self.size not in (None, size[:2]):
            raise InputError(
                f"{name} holds pictures of {size[1]}x{size[0]} pixels; the {self.kind} {self.path} takes "
                f"{self.size[1]}x{self.size[0]}"
            )


def open_network(spec: str) -> Network:
    """`classifier:PATH`, a file of `--make_classifier`, or else a file of Inception's weights or its published name.

    Raises InputError if there is no such thing, or it is another.
    """
    if spec.startswith(CLASSIFIER):
        path = spec.removeprefix(CLASSIFIER)
        config, params, known = read_classifier(path)
        apply = partial(apply_classifier, config)
        size = (config.image_size,) * 2
        return Network("classifier", path, digest(path), known, params, apply, ("pool",), size, config.channels)
    path = find(spec)
    params = read_inception(path)
    return Network("inception", str(path), digest(path), {}, params, apply_inception, ("pool", "spatial"), None, 3)


def apply_inception(params: dict, images: jax.Array) -> dict[str, jax.Array]:
    """What `InceptionV3` gives with these parameters."""
    graph, _ = abstract_inception()
    outputs = nnx.merge(graph, params)(images)
    return {"pool": outputs["pool"], "spatial": outputs["spatial"], "logits": outputs["logits_unbiased"]}


class Extractor:
    """A network on all devices of a mesh; each process reads the pictures of its own devices, and gets all features.

    Features do not depend on `batch`, the pictures that are computed at once, but for rounding.
    """

    def __init__(self, network: Network, mesh: Mesh, batch: int):
        self.network, self.mesh, self.batch = network, mesh, batch
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.params = jax.device_put(network.params, everywhere)
        self.program = jax.jit(network.apply, out_shardings=everywhere)

    def __call__(self, images: np.ndarray | ReadImages, name: str) -> Iterator[dict[str, np.ndarray]]:
        """What the network gives of (N, H, W, C) uint8 pictures, batch after batch; `name` is for bar and errors.

        Raises InputError if they do not suit the network.
        """
        self.network.require(images.shape[1:], name)
        count = len(images)
        size = -(-min(self.batch, count) // self.mesh.size) * self.mesh.size
        with tqdm(total=count, unit="image", desc=name, leave=False, disable=not processes.is_first()) as bar:
            late = None
            for start in range(0, count, size):
                outputs = self.program(self.params, self._place(images, start, size))
                if late:
                    yield from self._fetch(*late, bar)
                late = outputs, min(size, count - start)
            yield from self._fetch(*late, bar)

    def _place(self, images: np.ndarray | ReadImages, start: int, size: int) -> jax.Array:
        """The batch that begins at `start`, on the devices; beyond the last picture are blank ones."""

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = index[0].indices(size)
            found = images[start + first : min(start + stop, len(images))] if start + first < len(images) else None
            blank = np.zeros((stop - first, *images.shape[1:]), np.uint8)
            if found is not None:
                blank[: len(found)] = found
            return blank

        return jax.make_array_from_callback((size, *images.shape[1:]), batch_sharding(self.mesh), rows)

    @staticmethod
    def _fetch(outputs: Mapping[str, jax.Array], real: int, bar: tqdm) -> Iterator[dict[str, np.ndarray]]:
        yield {name: np.asarray(array)[:real] for name, array in outputs.items()}
        bar.update(real)


class Summary(NamedTuple):
    """What is kept of the features of a set."""

    count: int
    moments: dict[str, Moments]
    """By space."""
    features: np.ndarray
    """(N, D) float32, the pool's, for neighbours."""
    logits: np.ndarray
    """(N, classes) float32."""


def summarise(extract: Extractor, images: np.ndarray | ReadImages, name: str) -> Summary:
    """Features of a set and their statistics; 12 KB an image stay in memory with Inception."""
    moments = {space: Moments() for space in extract.network.spaces}
    kept = []
    for outputs in extract(images, name):
        for space, moment in moments.items():
            moment.add(outputs[space])
        kept.append((outputs["pool"], outputs["logits"]))
    features, logits = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return Summary(len(images), moments, features, logits)
