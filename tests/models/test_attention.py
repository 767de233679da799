"""Every way of computing attention gives the same."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.auto import flash_heads
from dit_jax.config import AttentionKind
from dit_jax.errors import InputError
from dit_jax.models import flash
from dit_jax.models.flash import flash_attention
from dit_jax.models.kernels import KERNELS, xla_attention
from dit_jax.models.local_attention import make_attend
from dit_jax.parallel.mesh import make_mesh

CASES = [(256, 2, 72), (512, 1, 64), (16, 3, 32), (9, 2, 8)]  # tokens, heads, width of a head


def in_plain_numbers(qkv: np.ndarray, head_dim: int) -> np.ndarray:
    """Softmax attention image by image and head by head, in float64."""
    out = np.empty((*qkv.shape[:2], qkv.shape[2] // 3))
    for image, rows in enumerate(qkv.astype(np.float64)):
        for head in range(qkv.shape[2] // (3 * head_dim)):
            q, k, v = np.split(rows[:, 3 * head * head_dim :][:, : 3 * head_dim], 3, axis=1)
            weights = np.exp(q @ k.T / np.sqrt(head_dim))
            out[image, :, head * head_dim :][:, :head_dim] = weights / weights.sum(1, keepdims=True) @ v
    return out


def example(tokens: int, heads: int, head_dim: int, images: int = 2):
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((images, tokens, 3 * heads * head_dim), dtype=np.float32)
    return qkv, rng.standard_normal((images, tokens, heads * head_dim), dtype=np.float32)


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), CASES)
def test_kernels_agree_with_the_equation(tokens, heads, head_dim):
    qkv, _ = example(tokens, heads, head_dim)
    expected = in_plain_numbers(qkv, head_dim)
    for out in (xla_attention(qkv, head_dim), flash_attention(qkv, head_dim, interpret=True)):
        np.testing.assert_allclose(out, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(256, 2, 72), (9, 2, 8)])
def test_gradients_are_those_that_jax_derives_from_the_equation(tokens, heads, head_dim):
    qkv, weight = example(tokens, heads, head_dim)

    def equation(qkv):
        q, k, v = qkv.reshape(*qkv.shape[:2], heads, 3, head_dim).transpose(3, 0, 1, 2, 4)
        return jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(weight.shape)

    expected = jax.grad(lambda x: (equation(x) * weight).sum())(qkv)
    for kernel in (xla_attention, lambda x, head_dim: flash_attention(x, head_dim, interpret=True)):
        gradient = jax.grad(lambda x: (kernel(x, head_dim) * weight).sum())(qkv)  # noqa: B023
        np.testing.assert_allclose(gradient, expected, atol=2e-6 * jnp.abs(expected).max())


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "DEFAULT"), ("float32", "HIGHEST")])
def test_the_tpu_kernel_multiplies_alike_whatever_the_default(dtype, precision):
    qkv = jnp.zeros((1, 16, 24), dtype)
    with jax.default_matmul_precision("highest" if dtype == "bfloat16" else "high"):
        program = str(jax.make_jaxpr(jax.grad(lambda x: flash_attention(x, 8).astype(jnp.float32).sum()))(qkv))
    assert program.count("dot_general[") == 7
    assert program.count(f"precision=(Precision.{precision}, Precision.{precision})") == 7


def test_heads_that_have_no_room_beside_each_other_take_turns(monkeypatch):
    qkv, weight = example(tokens=16, heads=6, head_dim=64)

    def with_gradient():
        return jax.value_and_grad(lambda x: (flash_attention(x, 64, interpret=True) * weight).sum())(qkv)

    def kernels() -> int:
        return str(jax.make_jaxpr(lambda x: flash_attention(x, 64))(qkv)).count("pallas_call[")

    whole, at_once = with_gradient(), kernels()
    monkeypatch.setattr(flash, "vector_memory", lambda: 700_000)
    assert (at_once, kernels()) == (1, 3)
    jax.tree.map(np.testing.assert_array_equal, with_gradient(), whole)
    monkeypatch.setattr(flash, "vector_memory", lambda: 500_000)
    with pytest.raises(InputError, match="flash has no room for 16 tokens"):
        kernels()


# By libtpu 0.0.42 these compiled, and those with twice the heads took the MiB in brackets, or did not say.
@pytest.mark.parametrize(
    ("mebibytes", "tokens", "heads", "width", "at_once"),
    [
        (128, 1024, 16, 72, 16),
        (128, 4096, 12, 64, 6),  # [101, of which we take 100]
        (128, 4096, 16, 72, 8),  # [143]
        (64, 2048, 16, 72, 8),  # [71]
        (64, 4096, 16, 72, 4),  # [83]
        (16, 256, 16, 72, 16),
        (16, 512, 16, 72, 8),  # [18]
        (16, 576, 12, 64, 6),  # [18]: no multiple of 256 tokens, so all queries at once
        (16, 784, 6, 64, 3),  # [17]
        (16, 1024, 16, 72, 4),
        (16, 2304, 16, 72, 1),
        (16, 1156, 6, 64, 0),
    ],
)
def test_as_many_heads_are_computed_at_once_as_compile(mebibytes, tokens, heads, width, at_once):
    assert flash_heads(mebibytes * 2**20, tokens, heads, width, jnp.dtype("bfloat16")) == at_once


@pytest.mark.parametrize("name", ["global", "window", "mixed"])
def test_a_devices_cores_share_its_images(name, monkeypatch):
    """The same outputs and gradients as in one piece, and no device needs another's images."""
    devices = jax.local_device_count()
    qkv, weight = example(tokens=16, heads=2, head_dim=8, images=6 * devices)
    rows = NamedSharding(make_mesh(), P("data"))
    qkv, weight = jax.device_put((qkv, weight), rows)

    def compiled(kernel):
        attend = make_attend(AttentionKind(name, 2), True, KERNELS[kernel])

        @jax.jit
        def with_gradient(qkv, weight):
            out, backward = jax.vjp(lambda x: attend(x, 8), qkv)
            return out, *backward(weight)

        return with_gradient.lower(qkv, weight).compile()

    whole = compiled("xla")
    for cores, parts in [(4, 2), (6, 6), (64, 2), (1, 1)]:  # of a device, and what divides its six images
        monkeypatch.setattr(os, "cpu_count", lambda: cores * devices)  # noqa: B023
        shared = compiled("cores")
        assert shared.as_text().count(" dot(") == parts * whole.as_text().count(" dot(")
        assert not re.search("all-|permute", shared.as_text())
        for found, right in zip(shared(qkv, weight), whole(qkv, weight), strict=True):
            assert found.sharding.is_equivalent_to(rows, 3)
            np.testing.assert_allclose(found, right, atol=1e-6 * jnp.abs(right).max())


def some_masks(count: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(1).random((count, tokens, tokens)) < 0.5 + 0.5 * np.eye(tokens)


def test_the_kernel_hides_what_the_masks_hide_in_turn():
    qkv, weight = example(tokens=16, heads=2, head_dim=8, images=6)
    mask = some_masks(3, 16)

    def expected(qkv):
        q, k, v = qkv.reshape(6, 16, 2, 3, 8).transpose(3, 0, 1, 2, 4)
        return jax.nn.dot_product_attention(q, k, v, mask=np.tile(mask, (2, 1, 1))[:, None]).reshape(weight.shape)

    def with_gradient(function):
        out, backward = jax.vjp(function, qkv)
        return out, *backward(weight)

    ours = with_gradient(lambda x: flash_attention(x, 8, mask, interpret=True))
    for found, right in zip(ours, with_gradient(expected), strict=True):
        np.testing.assert_allclose(found, right, atol=2e-6 * jnp.abs(right).max())


@pytest.mark.parametrize("mask", [None, some_masks(2, 16)], ids=["all", "masks"])
def test_devices_take_their_own_images_and_heads(mask):
    qkv, weight = example(tokens=16, heads=4, head_dim=8, images=8)

    def gradient(qkv):
        return jax.grad(lambda x: (flash_attention(x, 8, mask, interpret=True) * weight).sum())(qkv)

    alone = gradient(qkv)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        shared = jax.jit(gradient)(qkv)
    np.testing.assert_allclose(shared, alone, atol=1e-6)


def test_a_mesh_that_would_cut_a_head_is_refused():
    qkv, _ = example(tokens=16, heads=3, head_dim=8)
    with (
        jax.set_mesh(make_mesh({"data": 2, "tensor": 4})),
        pytest.raises(InputError, match="does not divide the heads"),
    ):
        flash_attention(qkv, 8, interpret=True)


def test_a_mesh_that_would_part_the_windows_of_an_image_is_refused():
    qkv, _ = example(tokens=16, heads=2, head_dim=8, images=4)
    with jax.set_mesh(make_mesh({"data": 4}, jax.devices()[:4])), pytest.raises(InputError, match="1 windows"):
        flash_attention(qkv, 8, some_masks(2, 16), interpret=True)
