"""What samples are compared with: an ADM reference file, one of our own, or just pictures."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_jax.data.sources import Source
from dit_jax.errors import InputError
from dit_jax.evaluation.classifier import held_out
from dit_jax.evaluation.features import Extractor, Network, summarise
from dit_jax.evaluation.images import SETTINGS, Pictures, array_names, open_pictures, require_enough, source_images
from dit_jax.evaluation.statistics import Moments
from dit_jax.files import read_npz, replacing

KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Names of mean and covariance in a reference file, by space of features."""

NEIGHBOURS = 10_000  # images of a reference file that precision and recall are measured with, as in ADM's


class Reference(NamedTuple):
    """A set of pictures, or a part of it and the statistics of all."""

    pictures: Pictures
    gaussians: dict[str, tuple[np.ndarray, np.ndarray]]
    """(mean, covariance) by space; of the pictures if the file has none."""
    features: np.ndarray
    """(N, D) of the pictures."""
    has_statistics: bool

    def about(self) -> dict[str, Any]:
        """For the report."""
        statistics = "of the file" if self.has_statistics else "of its pictures"
        return self.pictures.about() | {"statistics": statistics}


class Opened(NamedTuple):
    """A reference whose pictures have not been looked at."""

    pictures: Pictures
    gaussians: dict[str, tuple[np.ndarray, np.ndarray]]


def open_reference(path: str | Path, network: Network) -> Opened:
    """A folder of pictures, or an .npz with `arr_0` and, if they come with it, statistics under `KEYS`.

    Statistics that a file does not say the origin of are Inception's, as in ADM's files; a classifier passes over
    them. Raises InputError for a damaged file, one that lacks some of the keys, or statistics of another network.
    """
    pictures = open_pictures(path)
    network.require(pictures.images.shape[1:], pictures.path)
    present = array_names(Path(path)) if Path(path).is_file() else set()
    origin = pictures.settings.get("features", {"kind": "inception"})
    if not present & {name for names in KEYS.values() for name in names} or origin["kind"] != network.kind:
        return Opened(pictures, {})
    if origin.get("sha256", network.sha256) != network.sha256:
        raise InputError(
            f"{path} was made with {origin['path']}, whose weights are others than those of {network.path}: give "
            "--features or --inception as it was, or make the reference again"
        )
    names = [name for space in network.spaces for name in KEYS[space]]
    arrays = read_npz(path, names)
    sizes = {len(arrays[names[0]]), *(length for name in names[:2] for length in arrays[name].shape)}
    if len(sizes) > 1:
        raise InputError(f"{path} holds mu of shape {arrays['mu'].shape}, sigma {arrays['sigma'].shape}: they differ")
    return Opened(pictures, {space: tuple(arrays[name] for name in KEYS[space]) for space in network.spaces})


def measure(opened: Opened, extract: Extractor) -> Reference:
    """The reference with its features."""
    summary = summarise(extract, opened.pictures.images, opened.pictures.path)
    of_pictures = {space: (moments.mean, moments.covariance) for space, moments in summary.moments.items()}
    has_statistics = bool(opened.gaussians)
    return Reference(opened.pictures, opened.gaussians or of_pictures, summary.features, has_statistics)


def write_reference(path: str | Path, source: Source, size: int, extract: Extractor, write: bool) -> int:
    """Write a reference file of a data set with the keys of ADM's, and count the images that its statistics are of.

    `arr_0` holds up to `NEIGHBOURS` of them, at equal distances. A classifier's are only those images of the data set
    that it was not trained on, if that is what it was trained on: it knows the others too well to compare with.
    Several processes measure together, and the one with `write` writes.
    """
    known, count = extract.network.known, len(source)
    chosen = held_out(count) if known.get("data") == repr(source) else np.arange(count)
    require_enough(len(chosen), repr(source))
    images = source_images(source, size, chosen)
    moments = {space: Moments() for space in extract.network.spaces}
    for outputs in extract(images, repr(source)):
        for space, moment in moments.items():
            moment.add(outputs[space])
    if write:
        shown = min(len(chosen), NEIGHBOURS)
        settings = {
            "data": repr(source),
            "image_size": size,
            "count": len(chosen),
            "of": count,
            "features": extract.network.about(),
        }
        arrays = {"arr_0": source_images(source, size, chosen[np.arange(shown) * len(chosen) // shown])[:]}
        for space, moment in moments.items():
            arrays |= dict(zip(KEYS[space], (moment.mean, moment.covariance), strict=True))
        with replacing(path) as temporary:
            np.savez(temporary, **arrays, **{SETTINGS: np.array(json.dumps(settings))})
    return len(chosen)
