"""The layers whose gradients or forms are our own, against the equations and what JAX derives from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.dit import REMAT_POLICIES
from dit_jax.models.layers import STATISTICS, gelu_tanh, modulated_norm


def normed(x, shift, scale, eps):
    """Layer normalisation by its equation (Ba et al. 2016, eq. 4), moved and scaled."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + eps) * (1 + scale) + shift


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_a_norm_and_its_gradients_are_those_of_the_equation(rows, eps):
    keys = jax.random.split(jax.random.key(0), 4)
    x, weights = 3 + 2 * jax.random.normal(keys[0], (3, 5, 16)), jax.random.normal(keys[1], (3, 5, 16))
    shift, scale = jax.random.normal(keys[2], (2, rows, 1, 16))

    def value_and_gradients(norm):
        return jax.value_and_grad(lambda *args: (norm(*args, eps) * weights).sum(), argnums=(0, 1, 2))(x, shift, scale)

    np.testing.assert_allclose(modulated_norm(x, shift, scale, eps), normed(x, shift, scale, eps), atol=1e-5)
    jax.tree.map(
        lambda ours, derived: np.testing.assert_allclose(ours, derived, rtol=1e-5, atol=1e-5),
        value_and_gradients(modulated_norm),
        value_and_gradients(normed),
    )


def test_a_norm_is_float32_and_its_gradient_in_the_dtype_of_the_tokens():
    x, row = jax.random.normal(jax.random.key(0), (2, 3, 8), jnp.bfloat16), jnp.zeros((2, 1, 8))
    out, backward = jax.vjp(modulated_norm, x, row, row)
    assert out.dtype == jnp.float32
    assert [gradient.dtype for gradient in backward(out)] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_gelu_and_its_gradient_are_those_of_the_tanh_form():
    x = np.linspace(-12, 12, 1001)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    slope = (1 + tanh) / 2 + x / 2 * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    np.testing.assert_allclose(gelu_tanh(jnp.float32(x)), x * (1 + tanh) / 2, atol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu_tanh))(jnp.float32(x)), slope, atol=2e-6)


def test_nothing_but_its_input_is_kept_for_gelus_gradient():
    x = jnp.ones((8, 16))
    with_gradient = jax.jit(lambda x: jax.vjp(gelu_tanh, x)[1](gelu_tanh(x))).lower(x).compile()
    assert with_gradient.as_text().count(" exponential(") == 2  # one of them again backward


@pytest.mark.parametrize(("remat", "kept"), [("full", 0), ("dots", 2)])
def test_dots_keeps_the_statistics_of_a_norm(remat, kept, capsys):
    x, row = jnp.ones((2, 3, 8)), jnp.ones((2, 1, 8))
    norm = jax.checkpoint(modulated_norm, policy=REMAT_POLICIES[remat])
    jax.ad_checkpoint.print_saved_residuals(norm, x, row, row)
    assert capsys.readouterr().out.count(STATISTICS) == kept
