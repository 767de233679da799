import jax
import pytest

from dit_jax.config import base_config
from dit_jax.errors import InputError
from dit_jax.training.optimizer import learning_rate, make_optimizer


def schedule(**changes):
    config = base_config()
    config.steps = 1000
    config.optimizer.update(learning_rate=1.0, **changes)
    return learning_rate(config)


def test_released_learning_rate_is_constant_from_the_first_step():
    rate = learning_rate(base_config())
    assert rate(0) == rate(399_999) == pytest.approx(1e-4)


def test_warmup_rises_from_zero_and_cosine_ends_at_zero():
    rate = schedule(warmup_steps=100, decay="cosine")
    assert [float(rate(step)) for step in (0, 50, 100, 550, 1000)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)


def test_unknown_decay_is_refused():
    with pytest.raises(InputError, match="constant or cosine"):
        schedule(decay="linear")


def test_clipping_may_be_switched_on_when_a_run_resumes():
    config, params = base_config(), {"w": jax.numpy.ones(3)}
    plain = make_optimizer(config).init(params)
    config.optimizer.clip_norm = 1.0
    assert jax.tree.structure(plain) == jax.tree.structure(make_optimizer(config).init(params))
