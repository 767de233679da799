"""The precision policy's matrix products, and the forms in which a CPU computes those of bfloat16 fast.

XLA multiplies bfloat16 by a CPU's own instructions (Intel's AMX) where the product is float32 and sums over the last
axis of its left operand. All others it turns into products of float32.
"""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from dit_jax.config import Precision


def float32_products() -> AbstractContextManager:
    """Around products of float32 that bfloat16 would spoil: they are such whatever JAX's default precision.

    If that is `high`, so are they: TF32 on GPUs, as the original multiplies, and three times bfloat16 on TPUs.
    """
    high = jax.config.jax_default_matmul_precision in ("high", "tensorfloat32")
    return jax.default_matmul_precision("high" if high else "float32")


def product(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
    """x: (..., d), kernel: (d, m) -> (all tokens, m) in `precision.results`.

    Tokens are flattened: a weight gradient that contracts one axis is about twice as fast on a CPU as one that
    contracts two.
    """
    x, kernel = x.astype(precision.results), kernel.astype(precision.results)
    tokens = x.reshape(-1, x.shape[-1])
    if precision.operands == precision.results:
        return tokens @ kernel
    return _product_of_bfloat16(tokens, kernel)


@jax.custom_vjp
def _product_of_bfloat16(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return matmul(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, ...]:
    x, kernel = kept
    d_out = d_out.astype(jnp.bfloat16)
    return times_transpose(d_out, kernel), sum_over_rows(x, d_out)


_product_of_bfloat16.defvjp(_forward, _backward)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a: (..., n, k), b: (..., k, m) -> (..., n, m) float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def times_transpose(a: jax.Array, b: jax.Array) -> jax.Array:
    """a: (..., n, k), b: (..., m, k) -> a times b's transpose, (..., n, m) float32."""
    return jnp.einsum("...nk,...mk->...nm", a, b, preferred_element_type=jnp.float32)


def sum_over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a: (..., n, k), b: (..., n, m) -> a's transpose times b, (..., k, m) float32. What is narrower is turned."""
    if a.shape[-1] > b.shape[-1]:
        return turned(matmul(turned(b), a))
    return matmul(turned(a), b)


def turned(x: jax.Array) -> jax.Array:
    """(..., n, d) -> (..., d, n) by its halves, for XLA makes a plain transpose a part of the product again."""
    *rest, n, d = x.shape
    halves = x.reshape(*rest, 2, n // 2, d) if n % 2 == 0 else x[..., None, :, :]
    return jnp.moveaxis(halves, -1, -3).reshape(*rest, d, n)
