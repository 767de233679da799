"""Products of bfloat16 that return float32: what they compute, and that a CPU is given the form that it is fast at."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import PRECISIONS
from dit_jax.models.kernels import dot_product_attention
from dit_jax.models.products import product, sum_over_rows, turned


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def products_of(function, *arguments):
    """(lhs dtype, rhs dtype, result dtype, whether the left operand's last axis is summed over) of each product."""
    program = jax.jit(function).lower(*arguments).as_text()
    form = re.compile(
        r"dot_general.*contracting_dims = \[(\d)\] x .*: \(tensor<([\dx]+)x(\w+)>, .*x(\w+)>\) -> .*x(\w+)>"
    )
    found = [form.search(line) for line in program.splitlines() if "dot_general" in line]
    return [(m[3], m[4], m[5], int(m[1]) == m[2].count("x")) for m in found]


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("tokens", [(2, 6), (1, 5)])
def test_a_product_and_its_gradients_are_of_rounded_operands(tokens, width):
    x, kernel, d_out = normal(0, *tokens, 8), normal(1, 8, width), normal(2, np.prod(tokens), width)

    def product_and_gradients(name, x, kernel, d_out):
        out, backward = jax.vjp(lambda x, kernel: product(x, kernel, PRECISIONS[name]), x, kernel)
        return out, *backward(d_out)

    ours = product_and_gradients("bfloat16_operands", x, kernel, d_out)
    expected = product_and_gradients("float32", *map(rounded, (x, kernel, d_out)))
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_product_and_its_gradients_are_those_that_a_cpu_computes_fast():
    gradient = jax.grad(lambda *xs: jnp.square(product(*xs, PRECISIONS["bfloat16_operands"])).sum(), argnums=(0, 1))
    assert products_of(gradient, jnp.ones((2, 6, 8)), jnp.ones((8, 4))) == [("bf16", "bf16", "f32", True)] * 3


def test_the_products_of_attention_are_those_that_a_cpu_computes_fast():
    heads = [normal(seed, 2, 3, 16, 8, dtype=jnp.bfloat16) for seed in range(3)]
    gradient = jax.grad(lambda *heads: dot_product_attention(*heads).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert products_of(gradient, *heads) == [("bf16", "bf16", "f32", True)] * 6


def test_attention_of_bfloat16_has_the_gradients_of_float32():
    heads = [rounded(normal(seed, 2, 3, 16, 8)) for seed in range(3)]

    def gradients(heads):
        weights = normal(9, 2, 3, 16, 8)
        return jax.grad(lambda *heads: (dot_product_attention(*heads) * weights).sum(), argnums=(0, 1, 2))(*heads)

    for ours, theirs in zip(gradients([h.astype(jnp.bfloat16) for h in heads]), gradients(heads), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=3e-2 * np.abs(theirs).max())


@pytest.mark.parametrize("rows", [1, 64, 7])
@pytest.mark.parametrize(("left", "right"), [(3, 5), (5, 3), (384, 32), (384, 31)])
def test_sums_over_rows(rows, left, right):
    a, b = normal(0, 2, rows, left, dtype=jnp.bfloat16), normal(1, 2, rows, right, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(turned(a), a.swapaxes(-1, -2))
    expected = np.einsum("bnk,bnm->bkm", a.astype(jnp.float32), b.astype(jnp.float32))
    np.testing.assert_allclose(jax.jit(sum_over_rows)(a, b), expected, rtol=1e-4, atol=1e-4)
