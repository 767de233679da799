"""Removing a head is what zeroing its rows of the output projection is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.cases import TINY, seeded_dit

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.inspection.ablation import head_importance
from dit_jax.inspection.images import Images, noise_like

TIMESTEPS = (20, 800)


@functools.cache
def measured(**change):
    model = seeded_dit(dataclasses.replace(TINY, **change))
    x0 = np.random.default_rng(0).standard_normal((5, 8, 8, 4)).astype(np.float32)
    images = Images(x0, np.array([1, 4, 0, 9, 9], np.int32), None)
    diffusion = GaussianDiffusion.create()
    return model, images, diffusion, head_importance(model, diffusion, images, TIMESTEPS)


@functools.partial(jax.jit, static_argnames="diffusion")
def losses(model, diffusion, x0, y, t, noise):
    return diffusion.losses(lambda x, t: model(x, t, y), x0, jnp.full(len(x0), t), noise)["loss"]


def loss_of(model, images, diffusion, t: int) -> np.ndarray:
    return np.asarray(losses(model, diffusion, images.x0, images.labels, t, noise_like(images.x0)), np.float64)


@pytest.mark.parametrize(
    "change", [{}, dict(attention="mixed:2*2,global", head_gate="token"), dict(heads_left=(4, 1, 4))]
)
def test_the_loss_changes_as_when_the_heads_output_rows_are_zero(change):
    model, images, diffusion, importance = measured(**change)
    whole = [loss_of(model, images, diffusion, t) for t in TIMESTEPS]
    np.testing.assert_allclose(importance.loss[1:], [each.mean() for each in whole], rtol=1e-5)
    assert ((importance.change[0] != 0) == model.config.head_exists).all()
    width = model.config.head_width
    for layer, head in ((0, 0), (2, 3)):
        less = jax.tree.map(lambda leaf: leaf, model)
        kernel = less.blocks.attn.proj.kernel
        kernel[...] = kernel[...].at[layer, head * width : (head + 1) * width].set(0)
        changes = [loss_of(less, images, diffusion, t) - before for t, before in zip(TIMESTEPS, whole, strict=True)]
        assert np.abs(changes).max() > 1e-3
        for i, change in enumerate(changes):
            assert importance.change[1 + i, layer, head] == pytest.approx(change.mean(), abs=2e-5)
            assert importance.error[1 + i, layer, head] == pytest.approx(change.std(ddof=1) / np.sqrt(5), abs=2e-5)


def test_the_first_row_is_the_mean_over_timesteps_and_its_own_error():
    *_, importance = measured()
    np.testing.assert_allclose(importance.loss[0], importance.loss[1:].mean(), rtol=1e-12)
    np.testing.assert_allclose(importance.change[0], importance.change[1:].mean(axis=0), atol=1e-12)
    assert importance.change.shape == importance.error.shape == (3, 3, 4)
    assert (importance.error[0] <= importance.error[1:].mean(axis=0) + 1e-12).all()
