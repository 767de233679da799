"""The watched pass: the output of the fast path, weights by the equation, statistics by plain loops."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.cases import TINY, seeded_dit

from dit_jax.config import attention_layers
from dit_jax.inspection.explicit import Inputs, seen_keys
from dit_jax.inspection.observe import observe
from dit_jax.inspection.statistics import FEW
from dit_jax.models.kernels import xla_attention
from dit_jax.models.layers import Modulation, modulated_norm
from dit_jax.models.local_attention import allowed

VARIANTS = {
    "plain": {},
    "windows, mixed, neighbourhoods": dict(attention="window:2*2,mixed:3*3,neighbourhood:3,global*1", depth=7),
    "token gates": dict(head_gate="token"),
    "condition gates": dict(head_gate="condition"),
    "qk_norm, rope": dict(qk_norm=True, rope=True),
    "cross-attention": dict(block="cross-attention"),
    "in-context": dict(block="in-context"),
    "adaLN": dict(block="adaLN"),
    "context": dict(context_features=6, context_tokens=5),
    "three heads, 3 x 3": dict(num_heads=3, hidden_size=48, input_size=6),
}


def example(name: str):
    config = dataclasses.replace(TINY, **VARIANTS[name])
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, config.input_size, config.input_size, 4))
    inputs = Inputs(x, jnp.array([3, 700]), jnp.array([1, 10]))
    if config.context_features:
        mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
        inputs = inputs._replace(context=jax.random.normal(keys[1], (2, 5, 6)), context_mask=mask)
    segments = np.random.default_rng(0).integers(0, 2, (2, config.tokens)).astype(np.int32)
    return seeded_dit(config), inputs, segments


@functools.cache
def all_seen(name: str, chunk: int = 256):
    model, inputs, segments = example(name)
    N = model.config.tokens + (2 if model.config.block == "in-context" else 0)
    watch = jax.jit(observe, static_argnames="chunk")
    return model, inputs, segments, watch(model, inputs, segments=segments, queries=jnp.arange(N), chunk=chunk)


@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gates_are_those_of_the_fast_path(name):
    model, inputs, _, seen = all_seen(name)
    out, gates = jax.jit(lambda model, inputs: model.with_gates(*inputs))(model, inputs)
    assert float(jnp.abs(out).max()) > 0.5
    assert float(jnp.abs(seen.out - out).max()) < 2e-5
    if gates is None:
        assert seen.widest_gate is None
    else:
        assert (np.asarray(seen.widest_gate) >= np.asarray(gates) - 1e-6).all() and seen.widest_gate.max() > 0


def test_weights_are_the_softmax_of_the_first_blocks_queries_and_keys():
    model, inputs, _, seen = all_seen("plain")
    tokens, conditions = model.embed(*inputs)
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    shift, scale, *_ = block.modulation(Modulation.activated(conditions.c))
    qkv = np.asarray(block.attn.qkv(modulated_norm(tokens, shift, scale)), np.float64)
    d = model.config.head_width
    for image in range(2):
        for head in range(model.config.num_heads):
            q, k, _ = np.split(qkv[image][:, 3 * d * head : 3 * d * (head + 1)], 3, axis=1)
            weights = np.exp(q @ k.T / math.sqrt(d))
            weights /= weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(seen.weights[0, image, head], weights, atol=1e-6)


@pytest.mark.parametrize("name", ["windows, mixed, neighbourhoods", "in-context", "three heads, 3 x 3"])
def test_statistics_are_those_of_plain_loops_over_the_weights(name):
    model, _, segments, seen = all_seen(name)
    side, patches = model.config.side, model.config.tokens
    masks, which = seen_keys(model.config, seen.weights.shape[-1])
    for (layer, image, head), _ in np.ndenumerate(np.zeros(seen.weights.shape[:3])):
        weights = np.asarray(seen.weights[layer, image, head], np.float64)
        mask = masks[which[layer, head % 2]]
        assert not weights[~mask].any()
        expected = in_loops(weights, mask, side, segments[image])
        for name, value in expected.items():
            found = float(getattr(seen.heads, name)[layer, image, head])
            assert found == pytest.approx(value, abs=2e-5), (name, layer, head)
    assert float(seen.heads.on_condition.max()) > 0.01 or seen.weights.shape[-1] == patches


def in_loops(weights: np.ndarray, mask: np.ndarray, side: int, segments: np.ndarray) -> dict[str, float]:
    patches, names = side**2, ("distance", "entropy", "relative_entropy", "within_1", "within_2", "within_4")
    sums = dict.fromkeys((*names, "on_condition", "same_segment", "same_segment_chance"), 0.0)
    for query in range(patches):
        row, mass, reachable = weights[query], weights[query, :patches].sum(), mask[query, :patches].sum()
        entropy = -sum(w * math.log(w) for w in row if w > 0)
        sums["entropy"] += entropy
        sums["relative_entropy"] += entropy / math.log(mask[query].sum()) if mask[query].sum() > 1 else 1.0
        sums["on_condition"] += 1 - mass
        for key in range(patches):
            distance = math.dist(divmod(query, side), divmod(key, side))
            share = row[key] / mass
            sums["distance"] += share * distance
            for radius in (1, 2, 4):
                sums[f"within_{radius}"] += share * (distance <= radius)
            same = segments[query] == segments[key]
            sums["same_segment"] += share * same
            sums["same_segment_chance"] += same * mask[query, key] / reachable
    means = {name: total / patches for name, total in sums.items()}
    columns = np.sort(weights[:patches].sum(axis=0))[::-1] / patches
    return means | {"sink": columns[: math.ceil(len(columns) / FEW)].sum()}


@pytest.mark.parametrize("name", ["windows, mixed, neighbourhoods", "in-context"])
def test_chunks_of_queries_change_nothing(name):
    *_, whole = all_seen(name)
    for chunk in (1, 5):
        *_, parts = all_seen(name, chunk)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_masks_are_those_of_each_block_and_parity_of_head():
    config = dataclasses.replace(TINY, **VARIANTS["windows, mixed, neighbourhoods"])
    masks, which = seen_keys(config, 16)
    kinds, everything = attention_layers(config.attention, 7), np.ones((16, 16), bool)
    shifted = [False, True, False, True, False, False, False]  # pairs begin anew with each kind
    for layer, (kind, moved) in enumerate(zip(kinds, shifted, strict=True)):
        even = allowed(kind, 4, moved)
        assert (masks[which[layer, 0]] == even).all()
        assert (masks[which[layer, 1]] == (everything if kind.name == "mixed" else even)).all()


def test_branches_are_measured_before_and_after_their_gates():
    model, inputs, _, seen = all_seen("plain")
    tokens, conditions = model.embed(*inputs)
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    modulation = block.modulation(Modulation.activated(conditions.c))
    qkv_norm = modulated_norm(tokens, *modulation[:2])
    branch, _ = block.attn(qkv_norm, conditions.c, xla_attention)
    norm = lambda a: np.linalg.norm(np.asarray(a).reshape(2, -1), axis=1)  # noqa: E731
    np.testing.assert_allclose(seen.attention.survives[0], norm(modulation[2] * branch) / norm(branch), rtol=1e-4)
    np.testing.assert_allclose(seen.attention.share[0], norm(modulation[2] * branch) / norm(tokens), rtol=1e-4)
    after = tokens + modulation[2] * branch
    fed = block.mlp(modulated_norm(after, *modulation[3:5]))
    np.testing.assert_allclose(seen.mlp.survives[0], norm(modulation[5] * fed) / norm(fed), rtol=1e-4)
    np.testing.assert_allclose(seen.mlp.share[0], norm(modulation[5] * fed) / norm(after), rtol=1e-4)
