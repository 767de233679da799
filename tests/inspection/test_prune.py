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
from dit_jax.inspection.prune import TOLERANCE, cut_heads, kept_heads, require_prunable, require_same, shut_heads
from dit_jax.models.dit import abstract_dit

INPUTS = Inputs(
    jax.random.normal(jax.random.key(1), (3, 8, 8, 4)), jnp.array([0, 400, 999]), jnp.array([2, 10, 5], jnp.int32)
)
CASES = {  # the config, the shut heads of each block, how many heads stay
    "as many in each": (dict(head_gate="token"), [[0, 2], [1, 3], [0, 1]], [2, 2, 2]),
    "all and none": (dict(head_gate="token"), [[0, 1, 2, 3], [], [0, 1, 3]], [1, 4, 1]),
    "condition, qk_norm, rope": (dict(head_gate="condition", qk_norm=True, rope=True), [[3], [0, 1], [2]], [3, 2, 3]),
    "mixed": (dict(head_gate="token", attention="mixed:2*2,global"), [[0, 1, 2], [2], [0, 2, 3]], [2, 4, 1]),
    "one pair of windows parted": (dict(head_gate="token", attention="window:2"), [[1], [0, 3], [0]], [3, 2, 3]),
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
    assert smaller.config.block_heads == tuple(stay) and smaller.config.head_width == model.config.head_width
    assert float(jnp.abs(out_of(smaller) - out_of(model)).max()) < 2e-5
    seen = jax.jit(observe)(smaller, INPUTS)
    assert float(jnp.abs(seen.out - out_of(smaller)).max()) < 2e-5
    state_dict = smaller.to_state_dict()
    assert [len(state_dict[f"blocks.{i}.attn.qkv.bias"]) for i in range(3)] == [3 * 16 * heads for heads in stay]
    for file in ("smaller.safetensors", "smaller"):
        save_dit(smaller, tmp_path / file)
        read = load_dit(tmp_path / file)
        assert read.config == smaller.config and (out_of(read) == out_of(smaller)).all()


def test_gates_of_missing_heads_are_shut_and_a_cut_network_can_be_cut_again():
    model = with_shut(dict(head_gate="token"), [[0, 1], [3], []])
    smaller = smaller_than(model, np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool))
    gates = np.asarray(jax.jit(lambda model: model.with_gates(*INPUTS)[1])(smaller))
    assert (gates[[0, 1], :, 3] == 0).all() and (gates[2] > 0).all()
    again = smaller_than(smaller, np.asarray(jax.jit(observe)(smaller, INPUTS).widest_gate).max(axis=1) == 0)
    assert again.config.block_heads == (2, 3, 4)
    assert float(jnp.abs(out_of(again) - out_of(model)).max()) < 2e-5


def test_a_network_of_uneven_heads_is_trained_and_what_it_lacks_stays_nothing():
    config = dataclasses.replace(TINY, heads_left=(1, 4, 2), head_dim=16)
    model = DiT(config, rngs=nnx.Rngs(0))
    gradients = jax.jit(nnx.grad(lambda model: jnp.square(model(*INPUTS) - INPUTS.x.mean()).sum()))
    model.final_layer.linear.kernel[...] = model.final_layer.linear.kernel[...] + 0.02
    model.blocks.adaLN_modulation.linear.bias[...] = model.blocks.adaLN_modulation.linear.bias[...] + 0.1
    found = gradients(model)["blocks"]["attn"]
    for name, axis in (("qkv", 2), ("proj", 1)):
        by_head = jnp.moveaxis(jnp.abs(found[name]["kernel"][...]), axis, 1).reshape(3, 4, -1).max(axis=-1)
        assert ((np.asarray(by_head) > 0) == (np.arange(4) < np.array([[1], [4], [2]]))).all()
    read = DiT.from_state_dict(config, model.to_state_dict())
    assert (out_of(read) == out_of(model)).all()


def test_cutting_a_head_that_is_open_changes_the_output():
    model = with_shut(dict(head_gate="token"), [[0], [1], [2]])
    wrong = np.zeros((3, 4), bool)
    wrong[:, 3] = True
    assert float(jnp.abs(out_of(smaller_than(model, wrong)) - out_of(model)).max()) > 1e-3


def test_one_head_stays_and_mixed_attention_keeps_pairs():
    config = dataclasses.replace(TINY, head_gate="token")
    assert [list(heads) for heads in kept_heads(config, np.ones((3, 4), bool))] == [[3]] * 3
    mixed = dataclasses.replace(config, attention="mixed:2")
    kept = kept_heads(mixed, np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 0]], bool))
    assert [list(heads) for heads in kept] == [[2, 3], [0, 3], [0, 1, 2, 3]]
    assert [list(heads) for heads in kept_heads(mixed, np.eye(4, dtype=bool)[[0, 1, 2]] | (np.arange(4) == 3))] == [
        [2, 1], [0, 1, 2, 3], [0, 1],
    ]  # fmt: skip


def test_what_cannot_be_cut_is_refused():
    shut = np.zeros((3, 4), bool)
    with pytest.raises(InputError, match=r"have 0, 0, 0 shut heads, and none of them can go"):
        kept_heads(dataclasses.replace(TINY, head_gate="token"), shut)
    shut[:2, 0] = True
    with pytest.raises(InputError, match=r"have 1, 1, 0 shut heads.* an even and an odd one"):
        kept_heads(dataclasses.replace(TINY, head_gate="token", attention="mixed:2"), shut)
    for left in ((1, 2), (0, 4, 4), (3, 3, 3), (5, 4, 4)):
        with pytest.raises(InputError, match="the heads of each of 3 blocks, at least 1, and num_heads=4"):
            dataclasses.replace(TINY, heads_left=left)
    with pytest.raises(InputError, match="cross-attention has num_heads in every block"):
        dataclasses.replace(TINY, heads_left=(1, 2, 4), block="cross-attention")
    with pytest.raises(InputError, match="half of the 3 heads"):
        dataclasses.replace(TINY, heads_left=(4, 3, 2), attention="mixed:2")
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


def test_outputs_are_compared_in_float32_whatever_the_network_computes_in():
    wide = dict(hidden_size=384, num_heads=6, input_size=32, dtype="bfloat16", head_gate="token")
    model = with_shut(wide, [[0], [1, 2], [3, 4, 5]])
    images = Images(np.asarray(jax.random.normal(jax.random.key(1), (2, 32, 32, 4))), np.array([2, 4], np.int32), None)
    diffusion = GaussianDiffusion.create()
    shut = shut_heads(model, diffusion, images, (0, 500))
    assert list(shut.sum(axis=1)) == [1, 2, 3]
    assert require_same(model, smaller_than(model, shut), diffusion, images, (0, 500)) <= TOLERANCE


def test_a_head_that_opens_at_another_timestep_is_found():
    model = with_shut(dict(head_gate="token"), [[0], [1], [2]])
    images = Images(np.asarray(INPUTS.x), np.array([2, 4, 5], np.int32), None)
    diffusion, shut = GaussianDiffusion.create(), np.eye(3, 4, dtype=bool)
    assert require_same(model, smaller_than(model, shut), diffusion, images, (0, 500)) <= TOLERANCE
    assert (shut_heads(model, diffusion, images, (0, 500)) == shut).all()
    shut[:] = [False, False, False, True]
    with pytest.raises(InputError, match=r"output at t=0 changes by .* one opens there"):
        require_same(model, smaller_than(model, shut), diffusion, images, (0, 500))
