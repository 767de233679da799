"""A network watched over images, timesteps and with and without its label; nothing of size heads x N x N is kept."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import DiTConfig
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.inspection.explicit import Inputs
from dit_jax.inspection.images import Images, noise_like
from dit_jax.inspection.observe import Branch, Observation, images_at_once, observe
from dit_jax.models.dit import DiT

VIEW_BYTES = 5 * 2**20  # of weights kept to be looked at, a byte each
VIEWED_IMAGES = 8
KEY_CELLS = 16  # a side: finer grids of keys are added up to this for the eye


class View(NamedTuple):
    """Attention of some queries at one image, timestep and half, to be looked at."""

    image: int
    timestep: int
    """Index into the timesteps, as the next into the halves."""
    half: int
    weights: np.ndarray
    """(depth, heads, queries, cells) float32, cells row by row: keys added up to at most KEY_CELLS a side."""
    x_t: np.ndarray
    """(S, S, C) what the network saw."""
    x_start: np.ndarray
    """(S, S, C) the picture that its output means."""


class Measurement(NamedTuple):
    """Means over the images, by half and timestep first."""

    halves: tuple[str, ...]
    timesteps: tuple[int, ...]
    heads: dict[str, np.ndarray]
    """By name, those of `HeadStatistics` that are known: (halves, T, depth, heads)."""
    branches: dict[str, np.ndarray]
    """attention_survives, attention_share, mlp_survives, mlp_share: (halves, T, depth)."""
    widest_gate: np.ndarray | None
    """(depth, heads): the largest gate of a head over everything that was seen."""
    queries: np.ndarray
    """(n,) the patches whose attention is in the views."""
    views: list[View]


def measure(
    model: DiT,
    diffusion: GaussianDiffusion,
    images: Images,
    timesteps: Sequence[int],
    progress: Callable[[int], None] = lambda passes: None,
) -> Measurement:
    """Watch the network on each image with noise added, at each timestep (of the process, 0 the least noisy).

    `progress` is told how many passes over one image were done. Raises InputError from the network's own checks.
    """
    config = model.config
    halves = ("conditional", "unconditional") if config.class_dropout_prob else ("conditional",)
    queries, viewed = kept_queries(config), choose_views(config, images.labels, len(timesteps), len(halves))
    noise, group = noise_like(images.x0), images_at_once(config)
    sums, widest, views = None, None, {}
    for first in range(0, len(images.x0), group):
        some = slice(first, first + group)
        x0, labels = images.x0[some], images.labels[some]
        segments = None if images.segments is None else images.segments[some]
        for half, name in enumerate(halves):
            y = labels if name == "conditional" else np.full_like(labels, config.num_classes)
            for step, t in enumerate(timesteps):
                mine = [i for i in range(first, first + len(x0)) if (i, half, step) in viewed]
                kept = queries if mine else None
                seen, x_t, x_start = _watched(model, diffusion, x0, noise[some], y, int(t), segments, kept)
                sums = _add(sums, seen, (len(halves), len(timesteps)), (half, step))
                if seen.widest_gate is not None:
                    gate = np.asarray(seen.widest_gate).max(axis=1)
                    widest = gate if widest is None else np.maximum(widest, gate)
                for i in mine:
                    weights = pooled(np.asarray(seen.weights[:, i - first]), config.side)
                    views[i, half, step] = View(
                        i, step, half, weights, np.asarray(x_t[i - first]), np.asarray(x_start[i - first])
                    )
                progress(len(x0))
    means = {name: total / len(images.x0) for name, total in sums.items()}
    branches = {name: means.pop(name) for name in list(means) if name.startswith(("attention_", "mlp_"))}
    ordered = [views[key] for key in sorted(views)]
    return Measurement(halves, tuple(timesteps), means, branches, widest, queries, ordered)


def kept_queries(config: DiTConfig) -> np.ndarray:
    """All patches of an image of up to 8 x 8; of larger ones 4 x 4 in the middle of equal squares."""
    side = config.side
    if side <= 8:
        return np.arange(side**2)
    places = (2 * np.arange(4) + 1) * side // 8
    return (places[:, None] * side + places).reshape(-1)


def choose_views(config: DiTConfig, labels: np.ndarray, timesteps: int, halves: int) -> set[tuple[int, int, int]]:
    """(image, half, timestep) of the views that fit: one at least, image by image, the first of each label first.

    labels: (n,) of the images, of which VIEWED_IMAGES are viewed at most.
    """
    repeated = [list(labels[:i]).count(label) for i, label in enumerate(labels)]
    images = np.argsort(repeated, kind="stable")[:VIEWED_IMAGES]
    size = config.depth * config.num_heads * len(kept_queries(config)) * cells_aside(config.side) ** 2
    order = [(int(i), half, step) for i in images for half in range(halves) for step in range(timesteps)]
    return set(order[: max(1, VIEW_BYTES // size)])


def pooled(weights: np.ndarray, side: int) -> np.ndarray:
    """(..., N): the weights of patches, the same number of them a side added up until there are at most KEY_CELLS.

    What falls on the tokens of an in-context condition is left out.
    """
    patches = weights[..., : side**2]
    cells = cells_aside(side)
    each = side // cells
    blocks = patches.reshape(*patches.shape[:-1], cells, each, cells, each)
    return blocks.sum(axis=(-3, -1)).reshape(*patches.shape[:-1], cells**2)


def cells_aside(side: int) -> int:
    """The most cells, up to KEY_CELLS, that side divides into; side itself where there are less than 8 of them."""
    return next((cells for cells in range(min(side, KEY_CELLS), 7, -1) if side % cells == 0), side)


@partial(jax.jit, static_argnames="diffusion")
def _watched(
    model: DiT,
    diffusion: GaussianDiffusion,
    x0: jax.Array,
    noise: jax.Array,
    y: jax.Array,
    t: int,
    segments: jax.Array | None,
    queries: jax.Array | None,
) -> tuple[Observation, jax.Array, jax.Array]:
    x_t = diffusion.q_sample(x0, t, noise)
    inputs = Inputs(x_t, diffusion.original_timesteps(t, len(x0)), y)
    seen = observe(model, inputs, segments=segments, queries=queries)
    return seen, x_t, diffusion.predict_x_start(seen.out, x_t, jnp.asarray(t))


def _add(sums: dict | None, seen: Observation, shape: tuple[int, int], place: tuple[int, int]) -> dict:
    """Sums over images in float64, those of one group added at a half and timestep."""
    found = {name: values for name, values in seen.heads._asdict().items() if values is not None}
    for name in ("attention", "mlp"):
        branch: Branch = getattr(seen, name)
        found |= {f"{name}_{field}": values for field, values in branch._asdict().items()}
    found = {name: np.asarray(values, np.float64).sum(axis=1) for name, values in found.items()}
    if sums is None:
        sums = {name: np.zeros((*shape, *values.shape)) for name, values in found.items()}
    for name, values in found.items():
        sums[name][place] += values
    return sums
