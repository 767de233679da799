"""How alike two sets of pictures are, from their features; as the ADM suite counts it (Dhariwal & Nichol 2021)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import InputError
from dit_jax.parallel.sharding import replicate, shard_batch

FOLD = 2048  # rows that are folded into a covariance at once: one rank-2048 product costs less than many small ones
BLOCK = 2**25  # distances that are held at once, 128 MB
HALF_MAX = 65504  # the largest number of half precision


class Moments:
    """Mean and covariance of rows that come in batches, in float64.

    Batches are centred on their own means before they are joined (Chan, Golub & LeVeque 1983, eq. 2.1), so nothing
    cancels, and how the rows are cut into batches changes nothing but rounding.
    """

    def __init__(self):
        self.count = 0
        self._mean = self._scatter = np.zeros(0)
        self._waiting: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Take (B, D) rows more."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= FOLD:
            self._fold()

    @property
    def mean(self) -> np.ndarray:
        """(D,) float64."""
        self._fold()
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, with N - 1. Raises InputError for fewer than two rows."""
        self._fold()
        if self.count < 2:
            raise InputError(f"{self.count} image has no covariance: expected at least two")
        return self._scatter / (self.count - 1)

    def _fold(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting).astype(np.float64)
        self._waiting = []
        if not self.count:
            self._mean, self._scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        mean, total = rows.mean(0), self.count + len(rows)
        rows -= mean
        apart = mean - self._mean
        self._scatter += rows.T @ rows
        self._scatter += np.outer(apart, apart * (self.count * len(rows) / total))
        self._mean = self._mean + apart * (len(rows) / total)
        self.count = total


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Dowson & Landau 1982; FID, Heusel et al. 2017).

    mu: (D,), sigma: (D, D), symmetric and positive semi-definite; float64 inside. With sigma = L L^T the trace of the
    root is the sum of the singular values of L1^T L2, which keeps its digits where covariances are singular: that of
    fewer images than features always is. Raises InputError if the shapes do not go together.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2))
    size = mu1.size
    if not (mu1.shape == mu2.shape == (size,) and sigma1.shape == sigma2.shape == (size, size)):
        shapes = ", ".join(str(array.shape) for array in (mu1, sigma1, mu2, sigma2))
        raise InputError(f"means and covariances of shapes {shapes}: expected (D,), (D, D), (D,), (D, D)")
    root_trace = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * root_trace
    return max(0.0, float(distance))  # rounding may bring nothing below nothing


def _factor(sigma: np.ndarray) -> np.ndarray:
    """L with L L^T = sigma; what rounding has made negative becomes zero."""
    values, vectors = np.linalg.eigh(sigma)
    return vectors * np.sqrt(values.clip(min=0))


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """exp(mean KL(p(y|x) || p(y))) of each `split_size` rows in order, the mean of them (Salimans et al. 2016, sec. 4).

    logits: (N, classes), without the bias where Inception's are published so. Raises InputError for none.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not len(logits) or split_size < 1:
        raise InputError(f"logits of shape {logits.shape} in splits of {split_size}: expected (images, classes)")
    return float(np.mean([_score(logits[i : i + split_size]) for i in range(0, len(logits), split_size)]))


def _score(logits: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(0)
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))  # a class without any probability has no share in it
    return float(np.exp((p * (log_p - log_marginal)).sum(1).mean()))


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3, half: bool = True) -> tuple[float, float]:
    """The share of samples that lie among reference images, and of those among samples (Kynkäänniemi et al. 2019).

    An image lies among others if it is no farther from one of them than that one's k-th neighbour is.

    Args:
        reference: (N, D) features.
        samples: (M, D).
        k: of the neighbour whose distance is the radius.
        half: whether distances are rounded as in the ADM evaluator, which computes them in half precision: published
            values have that in them, 1.2% of golden precision. Features whose distances half precision cannot hold
            are compared in float32 there too. False takes float32 distances of features around their common mean.

    `BLOCK` distances are held at a time, and devices of a mesh share the work. Raises InputError for fewer than k + 1
    images.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise InputError(f"features of shapes {reference.shape} and {samples.shape}: expected (N, D) and (M, D)")
    if min(len(reference), len(samples)) <= k:
        raise InputError(
            f"{len(reference)} reference images and {len(samples)} samples: precision and recall need at least {k + 1}"
        )
    half = half and all(4 * np.square(rows).sum(1, dtype=np.float64).max() < HALF_MAX for rows in (reference, samples))
    mean = 0 if half else reference.mean(0, dtype=np.float64)
    points = [Points.of((rows - mean).astype(np.float32), half) for rows in (reference, samples)]
    radii = [_neighbour_distances(each, k, half) for each in points]
    among_samples, among_reference = _within(points[0], radii[0], points[1], radii[1], half)
    return float(np.asarray(among_reference).mean()), float(np.asarray(among_samples).mean())


class Points(NamedTuple):
    """Features and what their squared lengths are taken for."""

    features: np.ndarray  # (N, D) float32
    norms: np.ndarray  # (N,) float32

    @classmethod
    def of(cls, features: np.ndarray, half: bool) -> "Points":
        """features: (N, D) float32. Half precision rounds them, their squares, and eight interleaved sums of those as
        they grow: so the ADM evaluator adds on a CPU."""
        if not half:
            return cls(features, np.square(features).sum(1))
        rounded = features.astype(np.float16)
        squares = np.square(np.pad(rounded, [(0, 0), (0, -rounded.shape[1] % 8)]))
        sums = np.zeros((len(rounded), 8), np.float16)
        for i in range(0, squares.shape[1], 8):
            sums += squares[:, i : i + 8]
        norms = sums.astype(np.float32).sum(1).astype(np.float16)
        return cls(rounded.astype(np.float32), norms.astype(np.float32))


@partial(jax.jit, static_argnums=(1, 2))
def _neighbour_distances(points: Points, k: int, half: bool) -> jax.Array:
    """Squared distance of each of N points to its k-th nearest other: (N,)."""

    def kth(rows: Points) -> jax.Array:
        negative, _ = jax.lax.top_k(-_squared_distances(rows, points, half), k + 1)  # the nearest is the row itself
        return negative[:, k]

    count = len(points.norms)
    return replicate(-jax.lax.map(kth, _in_blocks(points, count)).reshape(-1)[:count])


@partial(jax.jit, static_argnums=4)
def _within(
    rows: Points, row_radii: jax.Array, columns: Points, column_radii: jax.Array, half: bool
) -> tuple[jax.Array, jax.Array]:
    """Which of N rows lie in the ball of a column, and which of M columns in that of a row: (N,), (M,) bool."""

    def within(block: tuple[Points, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, radii, real = block
        distances = _squared_distances(rows, columns, half)
        in_a_ball = (distances <= radii[:, None]) & real[:, None]
        return (distances <= column_radii).any(1), in_a_ball.any(0)

    count = len(rows.norms)
    blocks = _in_blocks((rows, row_radii, jnp.ones(count, bool)), len(columns.norms))
    row_within, column_within = jax.lax.map(within, blocks)
    return replicate(row_within.reshape(-1)[:count]), replicate(column_within.any(0))


def _in_blocks(rows: Any, columns: int) -> Any:
    """Arrays (N, ...) -> (blocks, n, ...), of so many rows that their distances to the columns are at most `BLOCK`, and
    which the devices of a mesh divide; zeros fill the last block."""
    count, shards = len(jax.tree.leaves(rows)[0]), max(1, jax.sharding.get_abstract_mesh().size)
    size = -(-min(max(1, BLOCK // columns), count) // shards) * shards
    blocks = -(-count // size)

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, blocks * size - count)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(cut, rows)


def _squared_distances(rows: Points, columns: Points, half: bool) -> jax.Array:
    """n and m points -> (n, m) float32, with `half` rounded to half precision after every operation."""
    rounded = (lambda x: jax.lax.reduce_precision(x, 5, 10)) if half else (lambda x: x)
    products = rounded(jnp.matmul(shard_batch(rows.features), columns.features.T, precision="highest"))
    return jnp.maximum(rounded(rounded(rows.norms[:, None] - 2 * products) + columns.norms), 0)
