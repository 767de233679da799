"""The figures of a set of samples against a reference, and whether they can be compared with published ones."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.errors import InputError
from dit_jax.evaluation.features import Extractor, Network, Summary, open_network, summarise
from dit_jax.evaluation.reference import Reference, measure, open_reference
from dit_jax.evaluation.statistics import frechet_distance, inception_score, precision_recall

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
    "classifier_frechet_distance": "Fréchet distance of classifier features",
    "classifier_score": "Score of the classifier's logits",
    "classifier_precision": "Precision by classifier features",
    "classifier_recall": "Recall by classifier features",
}
"""For people. What a classifier gives is never called FID."""

PRECISION = {
    "inception": {
        "network": "float32, highest matmul precision",
        "mean and covariance": "float64",
        "neighbour distances": "float16, as in ADM's evaluator",
    },
    "classifier": {
        "network": "float32, highest matmul precision",
        "mean and covariance": "float64",
        "neighbour distances": "float32",
    },
}
"""What is computed in what, by kind of network."""

PUBLISHED_COUNT = 50_000
NEIGHBOURS_BY_SIZE = {512: 1_000}  # images in ADM's reference files; 10,000 at any other size


def compare(samples: Summary, reference: Reference, network: Network) -> dict[str, float]:
    """Every figure by name, those of `NAMES` that the network gives."""
    distances = {
        space: frechet_distance(moments.mean, moments.covariance, *reference.gaussians[space])
        for space, moments in samples.moments.items()
    }
    score, inception = inception_score(samples.logits), network.kind == "inception"
    precision, recall = precision_recall(reference.features, samples.features, half=inception)
    if inception:
        return {
            "fid": distances["pool"],
            "sfid": distances["spatial"],
            "inception_score": score,
            "precision": precision,
            "recall": recall,
        }
    return {
        "classifier_frechet_distance": distances["pool"],
        "classifier_score": score,
        "classifier_precision": precision,
        "classifier_recall": recall,
    }


def make_comparison(
    features: str, reference: str, shape: tuple[int, int, int], mesh: Mesh, batch: int
) -> Callable[[np.ndarray], dict[str, float]]:
    """A function from (N, H, W, C) uint8 samples of that shape to figures against a reference, which is measured once.

    features: see `open_network`. Raises InputError if the reference cannot be measured, or holds other pictures.
    """
    network = open_network(features)
    opened, extract = open_reference(reference, network), Extractor(network, mesh, batch)
    if opened.pictures.images.shape[1:] != shape:
        found, expected = ("x".join(map(str, each)) for each in (opened.pictures.images.shape[1:], shape))
        raise InputError(f"{reference} holds pictures of {found}, the model draws {expected}")
    with jax.set_mesh(mesh):
        measured = measure(opened, extract)
    return lambda samples: compare(summarise(extract, samples, "samples"), measured, network)


def caveats(count: int, reference: Reference, network: Network) -> list[str]:
    """Why these figures must not be put beside published ones; none if they may."""
    if network.kind == "classifier":
        return ["features of a classifier: not FID, comparable only with figures of the same classifier and reference"]
    found, images = [], len(reference.features)
    if count != PUBLISHED_COUNT:
        found.append(f"{count:,} samples: published values are of {PUBLISHED_COUNT:,}, and FID falls with their number")
    name, expected = (
        Path(reference.pictures.path).name,
        NEIGHBOURS_BY_SIZE.get(reference.pictures.images.shape[1], 10_000),
    )
    if not (name.startswith("VIRTUAL_") and reference.has_statistics):
        found.append(f"{name} is no reference file of the ADM suite (VIRTUAL_*.npz with mu and sigma)")
    elif images != expected:
        found.append(f"{name} holds {images:,} images for precision and recall: ADM's holds {expected:,}")
    return found
