from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.guidance import guided, guided_steps, guided_within
from dit_jax.diffusion.samplers import ddim_sample
from dit_jax.errors import InputError

Y = np.array([3, 0, 9])
T = np.array([0, 500, 999], np.int32)
X = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)


class FakeModel:
    """Mixes x, t and y in every output channel, each in another way; remembers its batch sizes."""

    def __init__(self, outputs=8, class_dropout_prob=0.1, dtype=jnp.float32):
        self.config = SimpleNamespace(in_channels=4, num_classes=10, class_dropout_prob=class_dropout_prob)
        self.weights = np.random.default_rng(1).standard_normal((4, outputs)).astype(np.float32)
        self.dtype = dtype
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        shift = (1.0 + y)[:, None, None, None] * np.arange(1, self.weights.shape[1] + 1)
        return (jnp.sin(x @ self.weights + shift) + t[:, None, None, None] / 1000).astype(self.dtype)


def by_hand(model, scale, channels):
    conditional, unconditional = np.asarray(model(X, T, Y)), np.asarray(model(X, T, np.full(3, 10)))
    result = conditional.copy()
    result[..., :channels] = (unconditional + scale * (conditional - unconditional))[..., :channels]
    return result


@pytest.mark.parametrize("outputs", [8, 4])
@pytest.mark.parametrize("channels, count", [(3, 3), (None, 4), (1, 1), (4, 4), (99, 4)])
def test_guidance_moves_the_first_noise_channels_and_no_other(outputs, channels, count):
    model = FakeModel(outputs)
    np.testing.assert_allclose(guided(model, Y, 4.0, channels)(X, T), by_hand(model, 4.0, count), atol=1e-5)


def test_the_released_guidance_is_the_default():
    np.testing.assert_allclose(guided(FakeModel(), Y)(X, T), by_hand(FakeModel(), 4.0, 3), atol=1e-5)


def test_both_halves_run_in_one_batch_and_scale_one_has_no_second_half():
    model = FakeModel()
    guided(model, Y, 1.5)(X, T)
    assert model.batches == [6]
    output = guided(model, Y, 1.0)(X, T)
    assert model.batches == [6, 3]
    np.testing.assert_array_equal(output, model(X, T, Y))


def test_one_compilation_serves_every_scale():
    model = FakeModel()
    sweep = jax.jit(lambda scale: guided(model, Y, scale)(X, T))
    for scale in (0.0, 1.0, 1.5):
        np.testing.assert_allclose(sweep(scale), by_hand(FakeModel(), scale, 3), atol=1e-5)
    assert model.batches == [6]


def test_halves_in_bfloat16_are_mixed_in_float32():
    model = FakeModel(dtype=jnp.bfloat16)
    output = guided(model, Y, 4.0)(X, T)
    assert output.dtype == jnp.float32
    conditional, unconditional = (np.asarray(model(X, T, y), np.float32)[..., :3] for y in (Y, np.full(3, 10)))
    np.testing.assert_allclose(output[..., :3], unconditional + 4.0 * (conditional - unconditional), atol=1e-5)


def test_a_model_without_null_class_is_refused_unless_scale_is_one():
    model = FakeModel(class_dropout_prob=0.0)
    guided(model, Y, 1)(X, T)
    with pytest.raises(InputError, match=r"scale is 1\.5, but this model has no null class"):
        guided(model, Y, 1.5)


def test_guiding_no_channel_is_refused():
    with pytest.raises(InputError, match="channels is 0"):
        guided(FakeModel(), Y, channels=0)


DIFFUSION = GaussianDiffusion.create("20")
LEVELS = np.sqrt((1 - DIFFUSION.alphas_cumprod) / DIFFUSION.alphas_cumprod)


def test_the_interval_is_of_noise_levels_open_below_and_closed_above():
    chosen = guided_steps((LEVELS[5], LEVELS[9]), DIFFUSION)
    assert np.flatnonzero(chosen).tolist() == [6, 7, 8, 9]
    assert guided_steps((), DIFFUSION).all() and guided_steps((0, 1e9), DIFFUSION).all()


def test_outside_the_interval_the_second_half_is_not_run():
    model = FakeModel()
    denoise = guided_within((LEVELS[5], LEVELS[9]), DIFFUSION, model, Y, 4.0)
    x = ddim_sample(DIFFUSION, denoise, X, None)
    assert set(model.batches) == {3, 6} and len(denoise) == 20
    for t in (5, 6, 9, 10):
        expected = by_hand(model, 4.0, 3) if 5 < t < 10 else model(X, T, Y)
        np.testing.assert_allclose(denoise[t](X, T), expected, atol=1e-5)
    everywhere = ddim_sample(DIFFUSION, guided_within((), DIFFUSION, model, Y, 4.0), X, None)
    np.testing.assert_array_equal(everywhere, ddim_sample(DIFFUSION, guided(model, Y, 4.0), X, None))
    assert jnp.abs(x - everywhere).max() > 0.01


def test_without_guidance_the_interval_changes_nothing():
    denoise = guided_within((LEVELS[5], LEVELS[9]), DIFFUSION, FakeModel(), Y, 1.0)
    assert len(set(denoise)) == 1, "one scan"


@pytest.mark.parametrize("interval", [(1.0,), (2.0, 1.0), (-1.0, 2.0), (float("nan"), 2.0), (0.1, 0.2, 0.3)])
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(InputError, match="0 <= low < high"):
        guided_steps(interval, DIFFUSION)


def test_an_interval_between_two_steps_is_refused():
    with pytest.raises(InputError, match=r"none of the 20 steps, whose noise levels go from 0\.01 to 157"):
        guided_steps((1000, 2000), DIFFUSION)
