"""FID, Inception Score, precision and recall against the ADM evaluator's own results, closed forms and brute force."""

import jax
import numpy as np
import pytest

import dit_jax
from dit_jax.errors import InputError
from dit_jax.evaluation import frechet_distance, inception_score, precision_recall, statistics
from dit_jax.evaluation.statistics import Moments
from dit_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def case():
    with np.load("tests/goldens/metrics.npz") as arrays:
        return dict(arrays)


def moments(rows: np.ndarray, batch: int = 100) -> tuple[np.ndarray, np.ndarray]:
    streamed = Moments()
    for i in range(0, len(rows), batch):
        streamed.add(rows[i : i + batch])
    return streamed.mean, streamed.covariance


def rows_of(rank: int, size: int, count: int, seed: int = 0) -> np.ndarray:
    """`count` rows of `size` features that vary in `rank` directions only."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, rank)) @ rng.normal(size=(rank, size)) + 3


def test_the_contract_names_are_there():
    assert dit_jax.evaluation.frechet_distance is frechet_distance
    assert dit_jax.evaluation.inception_score is inception_score
    assert dit_jax.evaluation.precision_recall is precision_recall


def test_fid_is_the_evaluators(case):
    ours = frechet_distance(*moments(case["ref"]), *moments(case["sample"]))
    assert ours == pytest.approx(float(case["fid"]), rel=1e-6)


@pytest.mark.parametrize(("rank", "count"), [(64, 500), (64, 40), (5, 500)])
def test_a_set_has_no_distance_from_itself_even_if_singular(rank, count):
    rows = rows_of(rank, 64, count)
    statistics_of = moments(rows)
    assert abs(frechet_distance(*statistics_of, *moments(rows, batch=7))) < 1e-6


@pytest.mark.parametrize("rank", [32, 6])
def test_a_shifted_gaussian_is_as_far_as_its_shift(rank):
    mu, sigma = moments(rows_of(rank, 32, 400))
    shift = np.linspace(-1, 2, 32)
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(np.sum(shift**2), rel=1e-9)


def test_gaussians_that_do_not_commute_have_the_distance_of_the_closed_form():
    # In two dimensions tr((AB)^(1/2)) = (tr(AB) + 2 det(AB)^(1/2))^(1/2).
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = 1 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(np.zeros(2), a, np.array([0, 1]), b) == pytest.approx(expected, rel=1e-12)


def test_distance_of_disjoint_singular_gaussians_is_the_sum_of_their_variances():
    a, b = np.diag([4.0, 0, 0]), np.diag([0, 9.0, 0])
    assert frechet_distance(np.zeros(3), a, np.zeros(3), b) == pytest.approx(13, rel=1e-12)


def test_covariance_streamed_in_batches_is_that_of_the_whole_array():
    rows = np.random.default_rng(0).normal(size=(6000, 96)) + 1e4  # a naive sum of squares loses eight digits here
    mean, covariance = moments(rows, batch=37)
    expected = np.cov(rows, rowvar=False)
    assert np.abs(mean - rows.mean(0)).max() < 1e-10 * np.abs(mean).max()
    assert np.abs(covariance - expected).max() < 1e-10 * np.abs(expected).max()


def test_features_of_float32_and_of_float64_give_the_same_fid():
    a, b = rows_of(64, 64, 800), rows_of(64, 64, 700, seed=1)
    single = [array.astype(np.float32) for array in (a, b)]
    in_float32 = [x for rows in single for x in (rows.mean(0), np.cov(rows, rowvar=False, dtype=np.float32))]
    expected = frechet_distance(*moments(a), *moments(b))
    assert frechet_distance(*moments(single[0]), *moments(single[1])) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*in_float32) == pytest.approx(expected, rel=1e-4)


def test_inception_score_is_the_evaluators(case):
    ours = inception_score(case["logits"], split_size=200)
    assert ours == pytest.approx(float(case["inception_score_split200"]), rel=1e-6)


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    assert inception_score(1e4 * np.tile(np.eye(10), (7, 1))) == pytest.approx(10)
    assert inception_score(np.zeros((20, 10))) == pytest.approx(1)


def test_precision_and_recall_are_the_evaluators(case):
    assert precision_recall(case["ref"], case["sample"], k=3) == (case["precision"][0], case["recall"][0])


def test_half_precision_moves_them_by_little_and_what_it_cannot_hold_is_not_rounded(case):
    exact = brute_force(case["ref"], case["sample"], k=3)
    assert precision_recall(case["ref"], case["sample"], half=False) == exact
    assert precision_recall(case["ref"], case["sample"]) == pytest.approx(exact, abs=0.01)
    assert precision_recall(case["ref"] * 100, case["sample"] * 100) == exact


@pytest.mark.parametrize("half", [True, False])
def test_blocks_and_devices_change_no_share(case, half, monkeypatch):
    reference, samples = case["ref"][:90], case["sample"][:77]
    whole = precision_recall(reference, samples, 2, half)
    monkeypatch.setattr(statistics, "BLOCK", 2000)
    jax.clear_caches()
    assert precision_recall(reference, samples, 2, half) == whole
    jax.clear_caches()
    with jax.set_mesh(make_mesh()):
        assert precision_recall(reference, samples, 2, half) == whole


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a, b):
        return np.square(a[:, None].astype(np.float64) - b[None]).sum(-1)

    balls = [np.sort(distances(a, a), axis=1)[:, k] for a in (reference, samples)]
    between = distances(samples, reference)
    return float((between <= balls[0]).any(1).mean()), float((between <= balls[1][:, None]).any(0).mean())


def test_a_set_covers_itself_and_nothing_far_away():
    rows = rows_of(8, 16, 60).astype(np.float32)
    assert precision_recall(rows, rows) == (1.0, 1.0)
    assert precision_recall(rows, rows + 1000) == (0.0, 0.0)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="1 image has no covariance"):
        moments(np.zeros((1, 4)))
    with pytest.raises(InputError, match="need at least 4"):
        precision_recall(np.zeros((3, 4)), np.zeros((9, 4)))
    with pytest.raises(InputError, match=r"\(9, 4\) and \(9, 5\)"):
        precision_recall(np.zeros((9, 4)), np.zeros((9, 5)))
    with pytest.raises(InputError, match=r"\(3,\), \(3, 3\), \(2,\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(InputError, match=r"\(0, 10\)"):
        inception_score(np.zeros((0, 10)))
