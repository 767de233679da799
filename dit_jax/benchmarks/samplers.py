"""What a sampler's pictures are worth for the work that they take: by sampler, steps and guidance."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from dit_jax.benchmarks.rates import Row
from dit_jax.checkpoints.files import open_weights
from dit_jax.data.sources import open_source
from dit_jax.data.words import open_context
from dit_jax.errors import InputError
from dit_jax.evaluation.agreement import judge
from dit_jax.evaluation.comparison import make_comparison
from dit_jax.evaluation.images import labelled_images
from dit_jax.files import replacing
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.processes import is_first
from dit_jax.sampling.generate import SAMPLERS, make_generate, network_passes
from dit_jax.training.evaluating import draw

STEPS = (10, 25, 50, 250)
GUIDANCE = (1.0, 1.5, 2.0, 4.0)
BATCH = 250  # images at once
MEASURES = {
    "agreement": "images that show the class asked for",
    "spread_ratio": "spread within a class, real images: 1",
    "classifier_frechet_distance": "Fréchet distance, classifier features",
}


def compare(
    weights: str,
    data: str,
    count: int,
    features: str | None = None,
    reference: str | None = None,
    samplers: Sequence[str] = tuple(SAMPLERS),
    steps: Sequence[int] = STEPS,
    guidance: Sequence[float] = GUIDANCE,
) -> list[Row]:
    """Draw `count` pictures, every class equally often, from the same noise with each setting, and judge them.

    A row says how often the network ran for an image ("evaluations": a guided step is two) and, of MEASURES, what
    `judge` found with the real images of `data`, and the distance from a reference by a classifier's features if both
    are given, as to `make_comparison`. Raises InputError for a network that draws latents.
    """
    opened = open_weights(weights)
    record, params = opened.record, opened.params()
    if record.model.in_channels not in (1, 3):
        raise InputError(f"{weights} draws latents: judging takes pixels, of a data set small enough for scikit-learn")
    labels = np.resize(np.arange(len(record.class_names), dtype=np.int32), count)
    words = open_context(record.context, record.class_names, record.model)
    context = words.tokens(words.in_turn(labels)) if words else ()
    side = record.model.input_size
    real = labelled_images(open_source(data), side)
    figures_of = lambda images: {}  # noqa: E731
    if features and reference:
        figures_of = make_comparison(features, reference, (side, side, record.model.in_channels), make_mesh(), BATCH)
    rows = []
    every = list(product(samplers, guidance, steps))
    for sampler, scale, number in tqdm(every, unit="setting", disable=not is_first()):
        settings = dict(record.sample) | {"sampler": sampler, "steps": number, "guidance": scale}
        generate = make_generate(record.model, record.diffusion, **settings)
        images = draw(generate, params, labels, context, seed=0, batch=min(BATCH, count))
        found = judge(images, labels, *real, record.class_names) | figures_of(images)
        rows.append(
            {"name": f"{sampler}, guidance {scale:g}, {number} steps", "sampler": sampler, "guidance": scale}
            | {"steps": number, "evaluations": network_passes(record.diffusion, **settings), "count": count}
            | {measure: found[measure] for measure in MEASURES if measure in found}
        )
    return rows


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """A PNG: each measure over the number of network evaluations, a column for each guidance, a line a sampler."""
    scales, samplers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("guidance", "sampler"))
    measures = [measure for measure in MEASURES if measure in rows[0]]
    figure = Figure(figsize=(3.2 * len(scales) + 0.8, 2.7 * len(measures) + 0.6), layout="constrained")
    axes = figure.subplots(len(measures), len(scales), sharex="col", sharey="row", squeeze=False)
    for (i, measure), (j, scale) in product(enumerate(measures), enumerate(scales)):
        ax = axes[i, j]
        for sampler, marker in zip(samplers, "osD^", strict=False):
            own = [row for row in rows if row["guidance"] == scale and row["sampler"] == sampler]
            ax.plot(
                [row["evaluations"] for row in own], [row[measure] for row in own], marker=marker, ms=4, label=sampler
            )
        ax.set_xscale("log")
        ax.set_xticks(evaluations := sorted({row["evaluations"] for row in rows if row["guidance"] == scale}))
        ax.set_xticklabels(evaluations)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        if i == 0:
            ax.set_title(f"guidance {scale:g}" if scale != 1 else "no guidance", fontsize=10)
    for ax, measure in zip(axes[:, 0], measures, strict=True):
        ax.set_ylabel(MEASURES[measure], fontsize=9)
    figure.supxlabel("network evaluations an image", fontsize=10)
    axes[0, 0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
