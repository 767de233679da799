"""A network without its shut heads gives what it gave with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import TINY, seeded_dit

from dit_jax import DiT, load_dit, save_dit
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.errors import InputError
from dit_jax.inspection.conditions import widest_condition_gates
from dit_jax.inspection.explicit import Inputs
from dit_jax.inspection.images import Images
from dit_jax.inspection.observe import observe
from dit_jax.inspection.prune import TOLERANCE, cut_heads, kept_heads, require_prunable, require_same
from dit_jax.models.dit import abstract_dit

INPUTS = Inputs(
    jax.random.normal(jax.random.key(1), (3, 8, 8, 4)), jnp.array([0, 400, 999]), jnp.array([2, 10, 5], jnp.int32)
)
CASES = {  # the config, the shut heads of each block, the heads that stay
    "token": (dict(head_gate="token"), [[0, 2], [1, 3], [0, 1, 3]], 2),
    "condition, qk_norm, rope": (dict(head_gate="condition", qk_norm=True, rope=True), [[3], [0, 1], [2]], 3),
    "mixed": (dict(head_gate="token", attention="mixed:2*2,global"), [[0, 1, 2], [2, 3], [0, 2]], 2),
    "windows": (dict(head_gate="token", attention="window:2*2,neighbourhood:3"), [[1, 2], [0, 3], [0, 1]], 2),
}


@jax.jit
def out_of(model: DiT) -> jax.Array:
    return model(*INPUTS)


def with_shut(change: dict, shut: list[list[int]]) -> DiT:
    model = seeded_dit(dataclasses.replace(TINY, **change))
    linear = model.blocks.attn.gate.linear
    for layer, heads in enumerate(shut):
        linear.kernel[...] = linear.kernel[...].at[layer, :, heads].set(0)
        linear.bias[...] = linear.bias[...].at[layer, heads].set(-3.0)
    return model


def smaller_than(model: DiT, shut: np.ndarray) -> DiT:
    config, params = cut_heads(model.config, nnx.to_pure_dict(nnx.state(model, nnx.Param)), shut)
    graph, shapes = abstract_dit(config)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, params)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_same_and_heads_fewer(name, tmp_path):
    change, heads, stay = CASES[name]
    model = with_shut(change, heads)
    shut = np.asarray(jax.jit(observe)(model, INPUTS).widest_gate).max(axis=1) == 0
    assert [list(np.flatnonzero(row)) for row in shut] == heads
    smaller = smaller_than(model, shut)
    assert smaller.config.num_heads == stay and smaller.config.head_width == model.config.head_width
    assert float(jnp.abs(out_of(smaller) - out_of(model)).max()) < 2e-5
    save_dit(smaller, tmp_path / "smaller.safetensors")
    read = load_dit(tmp_path / "smaller.safetensors")
    assert read.config == smaller.config and (out_of(read) == out_of(smaller)).all()


def test_cutting_a_head_that_is_open_changes_the_output():
    model = with_shut(dict(head_gate="token"), [[0], [1], [2]])
    wrong = np.zeros((3, 4), bool)
    wrong[:, 3] = True
    assert float(jnp.abs(out_of(smaller_than(model, wrong)) - out_of(model)).max()) > 1e-3


def test_one_head_stays_and_mixed_attention_keeps_pairs():
    config = dataclasses.replace(TINY, head_gate="token")
    assert kept_heads(config, np.ones((3, 4), bool)).shape == (3, 1)
    mixed = dataclasses.replace(config, attention="mixed:2")
    kept = kept_heads(mixed, np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1]], bool))
    assert kept.tolist() == [[2, 3], [0, 3], [2, 1]]
    assert (kept % 2 == [0, 1]).all()


def test_what_cannot_be_cut_is_refused():
    shut = np.zeros((3, 4), bool)
    shut[:2, 0] = True
    with pytest.raises(InputError, match=r"have 1, 1, 0 shut heads.*nothing to cut"):
        kept_heads(dataclasses.replace(TINY, head_gate="token"), shut)
    with pytest.raises(InputError, match="even and odd to be cut in pairs"):
        kept_heads(dataclasses.replace(TINY, head_gate="token", attention="mixed:2"), shut)
    with pytest.raises(InputError, match="have no gates"):
        require_prunable(TINY)
    with pytest.raises(InputError, match="cross-attention"):
        require_prunable(dataclasses.replace(TINY, head_gate="token", block="cross-attention"))


def test_a_gate_of_the_condition_is_measured_at_every_timestep_and_label():
    model = seeded_dit(dataclasses.replace(TINY, head_gate="condition"))
    widest = widest_condition_gates(model, 1000)
    rng, largest = np.random.default_rng(0), np.zeros((3, 4))
    x, forward = np.zeros((256, 8, 8, 4), np.float32), jax.jit(lambda *inputs: model.with_gates(*inputs)[1])
    for _ in range(4):
        gates = np.asarray(forward(x, rng.integers(0, 1000, 256), rng.integers(0, 11, 256)))
        largest = np.maximum(largest, gates.max(axis=1))
    assert (largest <= widest + 1e-5).all() and (largest > 0.9 * widest).all()


def test_a_head_that_opens_at_another_timestep_is_found():
    model = with_shut(dict(head_gate="token"), [[0], [1], [2]])
    images = Images(np.asarray(INPUTS.x), np.array([2, 4, 5], np.int32), None)
    diffusion, shut = GaussianDiffusion.create(), np.eye(3, 4, dtype=bool)
    assert require_same(model, smaller_than(model, shut), diffusion, images, (0, 500)) <= TOLERANCE
    shut[:] = [False, False, False, True]
    with pytest.raises(InputError, match=r"output at t=0 changes by .* one opens there"):
        require_same(model, smaller_than(model, shut), diffusion, images, (0, 500))
