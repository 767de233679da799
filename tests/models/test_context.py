"""Condition tokens: which count, which do not, and how the paper's other blocks begin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import TINY, seeded_dit

from dit_jax import DiT, guided
from dit_jax.config import CHOICES
from dit_jax.errors import InputError

TOLD = dataclasses.replace(TINY, depth=2, context_features=6, context_tokens=5)
T, Y = np.array([0, 500, 999]), np.array([0, 3, 9])
X = np.random.default_rng(0).standard_normal((3, 8, 8, 4), dtype=np.float32)
CONTEXT = np.random.default_rng(1).standard_normal((3, 5, 6), dtype=np.float32)
MASK = np.arange(5) < np.array([[2], [5], [0]])


@pytest.fixture(scope="module")
def model():
    return seeded_dit(TOLD)


def test_tokens_that_are_not_there_have_no_influence_and_those_there_do(model):
    changed = np.where(MASK[..., None], CONTEXT, 1e3 * CONTEXT[::-1])
    out = model(X, T, Y, CONTEXT, MASK)
    np.testing.assert_array_equal(model(X, T, Y, changed, MASK), out)
    other = model(X, T, Y, CONTEXT[:, ::-1] + 1, MASK)
    assert np.abs(other - out)[:2].min(axis=0).max() > 1e-3, "two rows have tokens"
    np.testing.assert_array_equal(other[2], out[2])


def test_no_tokens_none_and_a_mask_without_one_are_the_same(model):
    nothing = model(X, T, Y)
    np.testing.assert_array_equal(model(X, T, Y, np.zeros((3, 0, 6), np.float32)), nothing)
    np.testing.assert_allclose(model(X, T, Y, CONTEXT, np.zeros((3, 5), bool)), nothing, atol=1e-6)
    without_mask = model(X, T, Y, CONTEXT)
    np.testing.assert_array_equal(model(X, T, Y, CONTEXT, np.ones((3, 5), bool)), without_mask)
    assert np.abs(without_mask - nothing).max() > 1e-2


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 5, 6), (3, 6, 6), (3, 5, 6, 1), (3, 5)])
def test_a_context_of_another_shape_is_refused(model, shape):
    with pytest.raises(InputError, match=r"expects \(3, L, 6\) and \(3, L\), L at most 5"):
        model(X, T, Y, np.zeros(shape, np.float32))


def test_a_mask_of_another_length_and_a_context_that_nobody_reads_are_refused(model):
    with pytest.raises(InputError, match=r"its mask \(3, 4\)"):
        model(X, T, Y, CONTEXT, np.ones((3, 4), bool))
    with pytest.raises(InputError, match="takes no context"):
        DiT(TINY, rngs=nnx.Rngs(0))(X, T, Y, CONTEXT)


def test_a_new_context_adds_exactly_nothing_and_then_learns():
    model = DiT(TOLD, rngs=nnx.Rngs(0))
    model.final_layer.linear.kernel[...] += 1.0
    np.testing.assert_array_equal(model(X, T, Y, CONTEXT), model(X, T, Y))
    gradient = nnx.grad(lambda model: (model(X, T, Y, CONTEXT) ** 2).sum())(model)
    assert np.abs(gradient["blocks"]["cross_attn"]["proj"]["kernel"][...]).min(axis=(1, 2)).max() > 0


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_guidance_drops_the_context_with_the_label(model, scale):
    out = guided(model, Y, scale, 3, CONTEXT, MASK)(X, T)
    conditional, null = model(X, T, Y, CONTEXT, MASK), model(X, T, np.full(3, 10))
    expected = np.array(conditional)
    expected[..., :3] = (null + scale * (conditional - null))[..., :3]
    np.testing.assert_allclose(out, expected, atol=1e-4)
    kept = model(X, T, np.full(3, 10), CONTEXT, MASK)
    assert np.abs(kept - null)[:2].max() > 1e-2, "or this would not show that it was dropped"
    everything = guided(model, Y, scale, 3, CONTEXT)(X, T)
    np.testing.assert_array_equal(everything, guided(model, Y, scale, 3, CONTEXT, np.ones_like(MASK))(X, T))


@pytest.mark.parametrize("context", [{}, {"context_features": 6, "context_tokens": 5}], ids=["labels", "tokens"])
@pytest.mark.parametrize("block", CHOICES["block"])
def test_every_parameter_of_every_design_is_used(block, context):
    config = dataclasses.replace(TINY, depth=2, block=block, num_classes=3, **context)
    told = (CONTEXT,) if context else ()

    @jax.jit
    def gradients(model):
        return jax.grad(lambda model: (model(X, T, np.arange(3) + 1, *told) ** 2).sum())(model)

    paths = jax.tree_util.tree_leaves_with_path(gradients(seeded_dit(config)))
    assert len(paths) == len(jax.tree.leaves(DiT(config, rngs=nnx.Rngs(0))))
    for path, gradient in paths:
        depth = len(gradient) if "blocks" in str(path) else 1
        assert jnp.abs(gradient.reshape(depth, -1)).max(axis=1).min() > 1e-6, path
