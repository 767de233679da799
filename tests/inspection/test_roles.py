"""Attention made by hand gets the role that it was made to have."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.inspection.roles import GLOBAL, LOCAL, RULES, SINK, UNIFORM, roles
from dit_jax.inspection.statistics import finished, of_uniform_attention, summed

SIDE = 8
PLACES = np.stack(np.divmod(np.arange(SIDE**2), SIDE), axis=-1)
DISTANCE = np.linalg.norm(PLACES[:, None] - PLACES, axis=-1)


def patterns() -> dict[str, np.ndarray]:
    """(N, N) weights that sum to one for each query."""
    rng = np.random.default_rng(0)
    near = np.exp(-(DISTANCE**2))
    scattered = np.zeros((SIDE**2, SIDE**2))
    for query, row in enumerate(scattered):
        row[(query + rng.choice(SIDE**2, 4, replace=False)) % SIDE**2] = 1
    to_corner = np.full((SIDE**2, SIDE**2), 0.1)
    to_corner[:, [0, 7]] = 20
    drawn = {
        "local": near,
        "between": np.exp(-DISTANCE / 2.5),
        "global": scattered,
        "uniform": np.ones_like(near),
        "sink": to_corner,
    }
    return {role: weights / weights.sum(axis=1, keepdims=True) for role, weights in drawn.items()}


def role_of(weights: np.ndarray) -> str:
    N = len(weights)
    sums = summed(jnp.asarray(weights)[None, None], jnp.arange(N), jnp.ones((2, N, N), bool), SIDE, None)
    heads = finished(sums, SIDE)
    return str(roles(heads.distance, heads.relative_entropy, heads.sink, of_uniform_attention(SIDE)["distance"])[0, 0])


@pytest.mark.parametrize("role", dict(RULES))
def test_a_pattern_has_its_role(role):
    assert role_of(patterns()[role]) == role


def test_a_mirrored_head_that_looks_far_away_is_global():
    assert role_of(np.eye(SIDE**2)[::-1]) == "global"


def test_roles_change_at_their_thresholds():
    def role(distance=0.8, entropy=0.5, sink=0.1):
        return str(roles(np.array(distance), np.array(entropy), np.array(sink), 1.0))

    below = 1e-6
    assert role() == "between"
    assert role(sink=SINK) == "sink" and role(sink=SINK - below) == "between"
    assert role(distance=LOCAL) == "local" and role(distance=LOCAL + below) == "between"
    assert role(entropy=UNIFORM) == "uniform" and role(entropy=UNIFORM - below) == "between"
    assert role(distance=GLOBAL) == "global" and role(distance=GLOBAL - below) == "between"
    assert role(distance=LOCAL, entropy=1.0) == "local" and role(distance=1.0, entropy=1.0, sink=1.0) == "sink"


def test_uniform_attention_is_what_a_uniform_head_measures():
    N = SIDE**2
    sums = summed(jnp.full((1, 1, N, N), 1 / N), jnp.arange(N), jnp.ones((2, N, N), bool), SIDE, None)
    heads = finished(sums, SIDE)._asdict()
    for name, value in of_uniform_attention(SIDE).items():
        assert float(heads[name][0, 0]) == pytest.approx(value, rel=1e-5), name
