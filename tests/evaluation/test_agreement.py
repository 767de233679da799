"""The judge must praise real digits and notice wrong labels and collapse."""

import numpy as np
import pytest

from dit_jax.data.sources import open_source
from dit_jax.evaluation.agreement import judge


@pytest.fixture(scope="module")
def digits():
    source = open_source("digits")
    return source.images, np.asarray(source.labels), source.class_names


def test_real_digits_agree_and_are_as_varied_as_themselves(digits):
    images, labels, names = digits
    result = judge(images, labels, images, labels, names)
    assert result["agreement"] > 0.99 and result["classifier_accuracy"] > 0.97
    assert result["spread_ratio"] == pytest.approx(1.0)
    assert set(result["agreement_by_class"]) == set(names) and result["samples"] == 1797


def test_wrong_labels_and_noise_do_not_agree(digits):
    images, labels, names = digits
    assert judge(images, (labels + 1) % 10, images, labels, names)["agreement"] < 0.01
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert judge(noise, labels, images, labels, names)["agreement"] < 0.3


def test_collapse_shows_in_the_spread(digits):
    images, labels, names = digits
    means = np.stack([images[labels == c].mean(0) for c in range(10)])[labels]
    half_way = ((images + means) / 2).astype(np.uint8)
    assert judge(half_way, labels, images, labels, names)["spread_ratio"] == pytest.approx(0.5, abs=0.02)
