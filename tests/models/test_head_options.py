"""What may be added to attention: gates of heads, normalised and rotated queries and keys, heads of another width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import TINY, golden, random_like, relative_error, seeded_dit
from ml_collections import ConfigDict

from dit_jax import DiT, DiTConfig
from dit_jax.config import base_config
from dit_jax.errors import InputError
from dit_jax.models.attention import HeadGate, gated
from dit_jax.models.dit import abstract_dit
from dit_jax.models.positions import rotated
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training.state import init_state
from dit_jax.training.step import make_train_step


def with_fresh(config: DiTConfig, model: DiT) -> DiT:
    """A model with the weights of another, and new parameters where that has none."""
    fresh = nnx.to_pure_dict(nnx.state(DiT(config, rngs=nnx.Rngs(1)), nnx.Param))

    def merged(fresh: dict, known: dict) -> dict:
        return {
            name: merged(leaf, known.get(name, {})) if isinstance(leaf, dict) else known.get(name, leaf)
            for name, leaf in fresh.items()
        }

    return nnx.merge(abstract_dit(config)[0], merged(fresh, nnx.to_pure_dict(nnx.state(model, nnx.Param))))


@pytest.mark.parametrize("kind", ["token", "condition"])
def test_fresh_gates_are_exactly_open(kind):
    case, config, model = golden("dit_tiny"), TINY, seeded_dit(TINY)
    x, t, y = case["x"], case["t"], case["y"]
    gated_model = with_fresh(dataclasses.replace(config, head_gate=kind), model)
    out, gates = jax.jit(gated_model.with_gates)(x, t, y)
    assert (gates == 1).all() and gates.shape == (config.depth, len(x), config.num_heads)
    np.testing.assert_array_equal(out, jax.jit(model)(x, t, y))


def test_a_gate_follows_its_query_or_the_condition_and_shuts_exactly():
    x, c = jnp.eye(4)[None, :3], jnp.ones((1, 4))
    for kind, shape in (("token", (1, 3, 2)), ("condition", (1, 1, 2))):
        config = dataclasses.replace(TINY, hidden_size=4, num_heads=2, head_gate=kind)
        gate = HeadGate(config, rngs=nnx.Rngs(0))
        gate.linear.kernel[...] = jnp.array([[-30.0, 0], [30.0, 0], [0, 1.0], [0, 0]])
        gates = gate(x, c)
        assert gates.shape == shape
        if kind == "token":
            np.testing.assert_allclose(gates[0, :, 0], [0, 2.125, 1], atol=1e-6)
            assert gates[0, 0, 0] == 0  # shut, not nearly
        heads = jnp.arange(2.0 * 3 * 6).reshape(1, 3, 12)[:, :, :12]
        by_head = heads.reshape(1, 3, 2, 6) * gates[..., None]
        np.testing.assert_array_equal(gated(heads, gates), by_head.reshape(1, 3, 12))


def tiny_run(**changes) -> tuple[ConfigDict, dict]:
    config = base_config()
    model = dict(input_size=4, patch_size=1, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    config.model.update(model | {"head_gate": "token"})
    config.update(batch_size=8, **changes)
    config.optimizer.learning_rate = 0.01
    rng = np.random.default_rng(0)
    return config, {"x": rng.standard_normal((8, 4, 4, 2), dtype=np.float32), "y": np.arange(8) % 3}


def test_the_penalty_shuts_gates():
    opened = {}
    for penalty in (0.0, 3.0):
        config, batch = tiny_run(head_gate_penalty=penalty)
        mesh = make_mesh({"data": 1}, jax.devices()[:1])
        with jax.set_mesh(mesh):
            state, step = init_state(config, mesh), make_train_step(config, mesh)
            for _ in range(60):
                state, metrics = step(state, batch, None)
        opened[penalty] = float(metrics["head_gates"])
        assert metrics["loss"] < 3  # the diffusion's alone
    assert opened[3.0] < 0.2 < 0.6 < opened[0.0]


def test_rotation_makes_scores_depend_on_the_distance_along_rows_and_columns_alone():
    rng = np.random.default_rng(0)
    q, k = (np.tile(rng.standard_normal((1, 1, 1, 16), dtype=np.float32), (1, 25, 1, 1)) for _ in range(2))
    scores = np.einsum("nd,md->nm", rotated(q)[0, :, 0], rotated(k)[0, :, 0]).reshape(5, 5, 5, 5)
    for down, right in [(0, 1), (1, 0), (2, -1), (0, 0)]:
        same = [
            scores[row, column, row + down, column + right]
            for row in range(5 - down)
            for column in range(5)
            if 0 <= column + right < 5
        ]
        np.testing.assert_allclose(same, same[0], rtol=2e-5)
    assert abs(scores[0, 0, 0, 1] - scores[0, 0, 1, 0]) > 0.01  # rows and columns are told apart


def test_rotation_is_that_of_complex_numbers():
    x = np.random.default_rng(0).standard_normal((1, 9, 1, 8), dtype=np.float32)
    for token in range(9):
        halves = np.asarray(rotated(x))[0, token, 0].reshape(2, 2, 2)
        for half, place in enumerate((token % 3, token // 3)):
            first, second = x[0, token, 0].reshape(2, 2, 2)[half]
            turned = (first + 1j * second) * np.exp(1j * place * np.array([1, 0.01]))
            np.testing.assert_allclose(halves[half], [turned.real, turned.imag], atol=1e-6)


def test_normalised_queries_and_keys_do_not_see_their_length():
    config = dataclasses.replace(TINY, qk_norm=True)
    rng = np.random.default_rng(0)
    model = with_fresh(config, seeded_dit(TINY))
    attention = jax.tree.map(lambda leaf: leaf[0], model.blocks).attn
    qkv = rng.standard_normal((1, 16, 3 * config.hidden_size), dtype=np.float32)
    by_part = qkv.reshape(1, 16, config.num_heads, 3, -1)
    longer = (by_part * np.array([7, 0.3, 1], np.float32)[:, None]).reshape(qkv.shape)
    assert relative_error(attention.prepared(longer), attention.prepared(qkv)) < 1e-5
    q = by_part[..., 0, :]
    expected = q / np.sqrt((q**2).mean(-1, keepdims=True))
    assert relative_error(attention.prepared(qkv).reshape(by_part.shape)[..., 0, :], expected) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"head_gate": "token"},
        {"head_gate": "condition", "head_dim": 12, "num_heads": 3},
        {"qk_norm": True, "rope": True, "head_dim": 8},
    ],
)
def test_options_survive_the_state_dict_and_train(changes):
    config = dataclasses.replace(TINY, **changes)
    shapes = abstract_dit(config)[1]
    params = random_like(shapes, 0.2)
    model = nnx.merge(abstract_dit(config)[0], params)
    again = DiT.from_state_dict(config, model.to_state_dict())
    rng = np.random.default_rng(0)
    x, t, y = rng.standard_normal((2, 8, 8, 4), dtype=np.float32), np.array([1, 700]), np.array([0, 9])
    np.testing.assert_array_equal(jax.jit(again)(x, t, y), jax.jit(model)(x, t, y))
    grads = jax.jit(jax.grad(lambda model: jnp.square(model(x, t, y)).sum()))(model)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_a_width_that_does_not_turn_is_refused():
    with pytest.raises(InputError, match="no multiple of 4"):
        dataclasses.replace(TINY, rope=True, head_dim=6)


@pytest.mark.parametrize("field", ["head_gate", "block"])
def test_an_unknown_choice_is_refused(field):
    with pytest.raises(InputError, match=f"{field}='loud': expected"):
        dataclasses.replace(TINY, **{field: "loud"})
