"""Means over images, timesteps and halves, the views, and the images themselves."""

import dataclasses

import jax
import numpy as np
import pytest
from goldens.cases import TINY, seeded_dit

from dit_jax.checkpoints.codec import IDENTITY
from dit_jax.checkpoints.record import Record
from dit_jax.config import DiTConfig
from dit_jax.data.sources import open_source
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.errors import InputError
from dit_jax.inspection import observe as observing
from dit_jax.inspection.explicit import Inputs
from dit_jax.inspection.images import Images, choose, from_source, noise_like
from dit_jax.inspection.measure import VIEW_BYTES, cells_aside, choose_views, kept_queries, measure, pooled
from dit_jax.inspection.observe import images_at_once, observe

DIGITS = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=10, head_gate="token"
)


@pytest.fixture(scope="module")
def digits():
    return from_source(open_source("digits"), Record.of(DIGITS), IDENTITY, 6, None)


def test_means_are_those_of_the_images_one_by_one(digits, monkeypatch):
    model, diffusion, timesteps = seeded_dit(DIGITS), GaussianDiffusion.create(), (30, 700)
    monkeypatch.setattr(observing, "WEIGHTS_AT_ONCE", 4 * DIGITS.num_heads * 16**2)  # two groups: of 4 and of 2
    assert images_at_once(DIGITS) == 4
    found = measure(model, diffusion, digits, timesteps)
    noise, widest = noise_like(digits.x0), []
    for half, y in enumerate((digits.labels, np.full(6, 10))):
        for step, t in enumerate(timesteps):
            t = np.full(6, t)
            x_t = diffusion.q_sample(digits.x0, t, noise)
            seen = jax.jit(observe)(model, Inputs(x_t, t, y), segments=digits.segments, queries=np.arange(16))
            widest.append(np.asarray(seen.widest_gate).max(axis=1))
            for name in ("distance", "sink", "same_segment"):
                expected = np.asarray(getattr(seen.heads, name)).mean(axis=1)
                np.testing.assert_allclose(found.heads[name][half, step], expected, atol=1e-5)
            np.testing.assert_allclose(
                found.branches["mlp_share"][half, step], np.asarray(seen.mlp.share).mean(axis=1), rtol=1e-4
            )
            for view in found.views:
                if (view.half, view.timestep) == (half, step):
                    np.testing.assert_allclose(view.weights, seen.weights[:, view.image], atol=1e-5)
                    predicted = diffusion.predict_x_start(seen.out, x_t, t)[view.image]
                    np.testing.assert_allclose(view.x_start, predicted, atol=1e-3)
                    np.testing.assert_allclose(view.x_t, x_t[view.image], atol=1e-5)
    assert len(found.views) == 6 * 2 * 2
    np.testing.assert_allclose(found.widest_gate, np.max(widest, axis=0), atol=1e-5)


def test_a_model_without_a_null_class_has_one_half(digits):
    config = dataclasses.replace(DIGITS, class_dropout_prob=0.0, head_gate="none")
    found = measure(seeded_dit(config), GaussianDiffusion.create(), digits, (30,))
    assert found.halves == ("conditional",) and found.heads["distance"].shape == (1, 1, 2, 2)
    assert found.widest_gate is None


def test_large_models_are_watched_one_image_at_a_time_and_their_views_fit():
    xl = DiTConfig.preset("DiT-XL/2", input_size=64)
    assert images_at_once(xl) == 2 and images_at_once(DIGITS) == 16
    assert kept_queries(DIGITS).tolist() == list(range(16))
    assert kept_queries(xl)[:5].tolist() == [4 * 32 + 4, 4 * 32 + 12, 4 * 32 + 20, 4 * 32 + 28, 12 * 32 + 4]
    views = choose_views(xl, np.arange(8), 2, 2)
    each = xl.depth * xl.num_heads * 16 * cells_aside(xl.side) ** 2
    assert views == {(0, 0, 0), (0, 0, 1)} and len(views) * each <= VIEW_BYTES
    assert {image for image, *_ in choose_views(DIGITS, np.array([6, 6, 6, 2, 6, 1, 2, 6, 6, 3]), 1, 1)} == {
        0, 3, 5, 9, 1, 6, 2, 4
    }  # fmt: skip


def test_keys_are_added_up_to_cells():
    weights = np.random.default_rng(0).random((2, 32 * 32 + 2))
    cells = pooled(weights, 32).reshape(2, 16, 16)
    np.testing.assert_allclose(cells[1, 3, 5], weights[1, :1024].reshape(32, 32)[6:8, 10:12].sum())
    assert (pooled(weights[:, :16], 4) == weights[:, :16]).all()
    assert [cells_aside(side) for side in (4, 16, 24, 32, 34, 64)] == [4, 16, 12, 16, 34, 16]


def test_segments_part_the_digit_from_its_ground(digits):
    for x, segments in zip(digits.x0, digits.segments, strict=True):
        means = x.reshape(4, 2, 4, 2).mean(axis=(1, 3)).reshape(-1)
        assert 0 < segments.sum() < 16 and means[segments == 1].min() > means[segments == 0].max()


def test_images_do_not_depend_on_how_many_are_asked_for(digits):
    more = from_source(open_source("digits"), Record.of(DIGITS), IDENTITY, 9, None)
    assert (more.x0[:6] == digits.x0).all() and (more.labels[:6] == digits.labels).all()
    chosen = from_source(open_source("digits"), Record.of(DIGITS), IDENTITY, 7, [3, 8])
    assert set(chosen.labels) == {3, 8}


def test_a_network_draws_its_own_images_where_there_are_none():
    model, record = seeded_dit(DIGITS), Record.of(DIGITS)
    drawn = choose("generated:3", "digits", model, record, IDENTITY, 5, [4, 7])
    assert drawn.images.x0.shape == (5, 8, 8, 1) and drawn.images.labels.tolist() == [4, 7, 4, 7, 4]
    assert "DDIM in 3 steps" in drawn.origin and "drew them itself" in drawn.novelty
    known = choose(None, "digits", model, record, IDENTITY, 2, None)
    assert "Images of digits" in known.origin and "trained on all of that data" in known.novelty
    assert "may have seen" in choose("digits", "", model, record, IDENTITY, 2, None).novelty
    gone = choose(None, "folder:/nowhere", model, record, IDENTITY, 2, None)
    assert "cannot be read" in gone.origin and np.isfinite(gone.images.x0).all()


def test_what_does_not_fit_is_refused():
    source = open_source("digits")
    with pytest.raises(InputError, match="holds 1797 such images; 2000 were asked for"):
        from_source(source, Record.of(DIGITS), IDENTITY, 2000, None)
    with pytest.raises(InputError, match="autoencoder that is not known"):
        from_source(source, Record.of(TINY), None, 2, None)
    with pytest.raises(InputError, match="takes side 8 and 4 channels"):
        from_source(source, Record.of(TINY), IDENTITY, 2, None)
    with pytest.raises(InputError, match="more classes"):
        from_source(source, Record.of(dataclasses.replace(DIGITS, num_classes=2)), IDENTITY, 20, None)


def test_an_unconditional_networks_images_have_its_one_label():
    config = dataclasses.replace(DIGITS, num_classes=1)
    images: Images = from_source(open_source("digits"), Record.of(config), IDENTITY, 4, None)
    assert images.labels.tolist() == [0] * 4
