"""Sizes of the modulation are those of what the blocks are given."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import TINY, seeded_dit

from dit_jax import DiT
from dit_jax.inspection.conditions import MANY, PARTS, TOGETHER, measure_modulations, modulation_sizes


def test_sizes_are_root_mean_squares_of_each_blocks_modulation():
    model = seeded_dit(TINY)
    rng = np.random.default_rng(0)
    t, y = rng.integers(0, 1000, TOGETHER + 3), rng.integers(0, 11, TOGETHER + 3)
    sizes = modulation_sizes(model, t, y)
    c = model.t_embedder(jnp.asarray(t)) + model.y_embedder(jnp.asarray(y))
    linear = model.blocks.adaLN_modulation.linear
    for layer, (kernel, bias) in enumerate(zip(linear.kernel[...], linear.bias[...], strict=True)):
        values = np.asarray(nnx.silu(c)) @ np.asarray(kernel) + np.asarray(bias)
        for part, chunk in zip(PARTS, np.split(values, 6, axis=1), strict=True):
            expected = np.sqrt(np.square(chunk).mean(axis=1))
            np.testing.assert_allclose(sizes[part][:, layer], expected, rtol=1e-4, err_msg=part)


def test_gates_are_zero_at_initialisation_and_one_without_any():
    fresh = measure_modulations(DiT(TINY, rngs=nnx.Rngs(0)), (0, 999), (0,))
    assert all(not values.any() for values in fresh.sizes.values())
    gateless = measure_modulations(seeded_dit(dataclasses.replace(TINY, block="adaLN")), (0, 999), (0,))
    assert (gateless.sizes["attention_gate"] == 1).all() and (gateless.sizes["mlp_gate"] == 1).all()
    assert gateless.sizes["attention_scale"].std() > 0


@pytest.mark.parametrize(("classes", "dropout", "rows"), [(10, 0.1, [*range(11)]), (10, 0.0, [*range(10)])])
def test_every_label_is_measured_where_they_are_few(classes, dropout, rows):
    config = dataclasses.replace(TINY, num_classes=classes, class_dropout_prob=dropout)
    found = measure_modulations(seeded_dit(config), (5, 500), (3,))
    assert found.labels.tolist() == rows
    assert found.sizes["mlp_shift"].shape == (2, len(rows), TINY.depth)
    alone = modulation_sizes(seeded_dit(config), np.array([500]), np.array([7]))
    np.testing.assert_allclose(found.sizes["mlp_shift"][1, 7], alone["mlp_shift"][0], rtol=1e-5)


def test_of_many_labels_those_of_the_images():
    config = dataclasses.replace(TINY, num_classes=MANY + 1)
    assert measure_modulations(seeded_dit(config), (5,), (7, 3, 7)).labels.tolist() == [3, 7, MANY + 1]
