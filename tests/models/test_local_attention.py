"""Windows, neighbourhoods and mixed heads against attention written out query by query; schedules over the depth."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import random_like, relative_error

from dit_jax import DiTConfig
from dit_jax.config import AttentionKind, attention_layers
from dit_jax.errors import InputError
from dit_jax.models import local_attention
from dit_jax.models.dit import abstract_dit
from dit_jax.models.flash import flash_attention
from dit_jax.models.kernels import xla_attention
from dit_jax.models.local_attention import make_attend
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training.flops import forward_macs

HEADS, WIDTH = 4, 8
TINY = DiTConfig(input_size=9, patch_size=1, in_channels=2, hidden_size=32, depth=5, num_heads=4, num_classes=3)


def seen(kind: AttentionKind, side: int, query: int, shifted: bool, head: int) -> list[int]:
    """The keys of a query, one coordinate at a time."""

    def along(i: int) -> set[int]:
        if kind.name == "neighbourhood":
            first = min(max(i - kind.size // 2, 0), side - kind.size)
            return set(range(first, first + kind.size))
        start = -(kind.size // 2) if shifted else 0
        while start + kind.size <= i:
            start += kind.size
        return set(range(max(start, 0), min(start + kind.size, side)))

    if kind.name == "global" or (kind.name == "mixed" and head % 2):
        return list(range(side * side))
    rows, columns = along(query // side), along(query % side)
    return [row * side + column for row in sorted(rows) for column in sorted(columns)]


def query_by_query(qkv: jax.Array, kind: AttentionKind, shifted: bool) -> jax.Array:
    """Dense attention with everything hidden that a query does not see."""
    B, N, _ = qkv.shape
    q, k, v = qkv.reshape(B, N, HEADS, 3, WIDTH).transpose(3, 0, 2, 1, 4)
    hidden = np.full((HEADS, N, N), -np.inf, np.float32)
    for head in range(HEADS):
        for query in range(N):
            hidden[head, query, seen(kind, round(N**0.5), query, shifted, head)] = 0
    weights = jax.nn.softmax(jnp.einsum("bhnd,bhmd->bhnm", q, k) / WIDTH**0.5 + hidden)
    return jnp.einsum("bhnm,bhmd->bnhd", weights, v).reshape(B, N, -1)


@pytest.mark.parametrize(
    ("name", "size", "shifted", "side"),
    [
        *(("window", 3, shifted, 7) for shifted in (False, True)),
        *(("window", size, True, 6) for size in (2, 3, 6)),
        *(("mixed", 4, shifted, 8) for shifted in (False, True)),
        *(("neighbourhood", size, False, 7) for size in (1, 3, 4, 7)),
    ],
)
def test_blocks_and_their_gradients_are_those_of_attention_query_by_query(name, size, shifted, side):
    kind, rng = AttentionKind(name, size), np.random.default_rng(0)
    qkv = rng.standard_normal((2, side**2, 3 * HEADS * WIDTH), dtype=np.float32)
    weight = rng.standard_normal((2, side**2, HEADS * WIDTH), dtype=np.float32)

    def with_gradient(function):
        out, backward = jax.vjp(function, qkv)
        return out, *backward(weight)

    attend = make_attend(kind, shifted, xla_attention)
    ours = jax.jit(lambda: with_gradient(lambda x: attend(x, WIDTH)))()
    theirs = jax.jit(lambda: with_gradient(lambda x: query_by_query(x, kind, shifted)))()
    for found, expected in zip(ours, theirs, strict=True):
        assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("shifted", [False, True])
def test_many_windows_by_the_tpu_kernel_are_those_by_xla(shifted, monkeypatch):
    kind, rng = AttentionKind("window", 8), np.random.default_rng(0)
    qkv, weight = (rng.standard_normal((1, 4096, columns), dtype=np.float32) for columns in (48, 16))
    monkeypatch.setattr(local_attention, "flash_attention", partial(flash_attention, interpret=True))

    def with_gradient(attend):
        out, backward = jax.vjp(lambda x: attend(x, 8, kind, shifted), qkv)
        return out, *backward(weight)

    ours, theirs = map(with_gradient, (local_attention.windows_on_tpu, local_attention.local_attention))
    for found, expected in zip(ours, theirs, strict=True):
        assert relative_error(found, expected) < 2e-6


def test_a_schedule_names_the_blocks_in_order():
    window, near, mixed, everywhere = (
        AttentionKind("window", 4),
        AttentionKind("neighbourhood", 3),
        AttentionKind("mixed", 2),
        AttentionKind("global"),
    )
    assert attention_layers("window:4*2, mixed:2,global*3", 7) == (window,) * 2 + (mixed,) * 2 + (everywhere,) * 3
    assert attention_layers("global", 3) == (everywhere,) * 3
    assert attention_layers("neighbourhood:3*1,global*1", 2) == (near, everywhere)


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ("local", "expected global, window:SIZE"),
        ("window", "expected global, window:SIZE"),
        ("global:4", "expected global, window:SIZE"),
        ("window:0", "expected global, window:SIZE"),
        ("global*4", "names 4 blocks and there are 5"),
        ("global*6", "names 6 blocks and there are 5"),
        ("window:2,global", "names 0 blocks and there are 5"),
        ("window:2*5,global", "names 5 blocks and there are 5"),
        ("window:10", "10 patches are wider than the image's 9"),
    ],
)
def test_a_wrong_schedule_is_refused_in_one_line(schedule, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(TINY, attention=schedule)


def test_half_of_an_odd_number_of_heads_is_refused():
    with pytest.raises(InputError, match="half of the 1 heads"):
        dataclasses.replace(TINY, attention="mixed:3", num_heads=1)


def weights_of(config: DiTConfig) -> dict:
    shapes = abstract_dit(config)[1]
    return random_like(shapes, 0.2)


def inputs(config: DiTConfig, images: int = 2):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((images, config.input_size, config.input_size, config.in_channels), dtype=np.float32)
    return x, np.arange(images) * 300 + 5, np.arange(images) % config.num_classes


def block_by_block(config: DiTConfig, params: dict, x, t, y) -> jax.Array:
    """The network with its blocks one after the other, attention query by query."""
    model = nnx.merge(abstract_dit(config)[0], params)
    tokens, conditions = model.embed(x, t, y, None, None)
    kinds, modulations = attention_layers(config.attention, config.depth), model.modulations(conditions.c)
    shifted = False
    for i, kind in enumerate(kinds):
        shifted = i > 0 and kind == kinds[i - 1] and not shifted
        block, modulation = jax.tree.map(lambda leaf: leaf[i], (model.blocks, modulations))  # noqa: B023
        tokens, _ = block(tokens, modulation, conditions, lambda qkv, _: query_by_query(qkv, kind, shifted))  # noqa: B023
    return model.read_out(tokens, conditions.c)


@pytest.mark.parametrize(
    "schedule", ["window:3*3,global*2", "neighbourhood:3*1,mixed:4*3,window:2*1", "window:4", "global"]
)
def test_any_schedule_takes_the_same_weights_and_runs_its_blocks_in_order(schedule):
    config, params = dataclasses.replace(TINY, attention=schedule), weights_of(TINY)
    out = jax.jit(nnx.merge(abstract_dit(config)[0], params))(*inputs(config))
    assert relative_error(out, block_by_block(config, params, *inputs(config))) < 2e-5


def test_recomputing_and_unrolling_change_nothing():
    config, params = dataclasses.replace(TINY, attention="window:3*3,mixed:3*2"), weights_of(TINY)

    def gradient(config):
        graph = abstract_dit(config)[0]
        return jax.jit(jax.grad(lambda params: jnp.square(nnx.merge(graph, params)(*inputs(config))).sum()))(params)

    ours, plain = gradient(dataclasses.replace(config, remat="dots", unroll=5)), gradient(config)
    for changed, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert relative_error(changed, expected) < 2e-5


def test_a_mesh_computes_what_one_device_does():
    config, params = dataclasses.replace(TINY, attention="window:3*2,mixed:2*2,neighbourhood:3"), weights_of(TINY)
    call = jax.jit(lambda params, *args: nnx.merge(abstract_dit(config)[0], params)(*args))
    alone = call(params, *inputs(config, 4))
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert relative_error(call(params, *inputs(config, 4)), alone) < 2e-6


@pytest.mark.parametrize("schedule", ["window:5", "mixed:4", "neighbourhood:3"])
def test_the_compiler_counts_the_products_that_we_count(schedule):
    config = dataclasses.replace(TINY, input_size=14, depth=1, num_heads=2, head_dim=128, attention=schedule)
    (kind,) = attention_layers(schedule, 1)
    attend = make_attend(kind, True, xla_attention)
    qkv = jax.ShapeDtypeStruct((3, config.tokens, 3 * 2 * 128), jnp.float32)
    counted = jax.jit(lambda qkv: attend(qkv, 128)).lower(qkv).compile().cost_analysis()["flops"]
    without = forward_macs(dataclasses.replace(config, attention="global")) - 2 * config.tokens**2 * 2 * 128
    # The softmax, no product, is 2 to 3% of what the compiler counts.
    assert counted == pytest.approx(3 * 2 * (forward_macs(config) - without), rel=0.05)
