import math
import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.dit import abstract_dit
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.sharding import (
    batch_sharding,
    gather_batch,
    gather_parameters,
    parameter_spec,
    require_shards,
    settled,
    shard_batch,
    shard_features,
    shares,
    state_sharding,
)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks/mlp/fc1/kernel", (28, 1152, 4608), P(None, "fsdp", "tensor")),
        ("blocks/mlp/fc2/kernel", (28, 4608, 1152), P(None, "tensor", "fsdp")),
        ("blocks/attn/qkv/kernel", (28, 1152, 3456), P(None, "fsdp", "tensor")),
        ("blocks/attn/proj/bias", (28, 1152), P(None, "fsdp")),
        ("blocks/adaLN_modulation/linear/kernel", (28, 1152, 6912), P(None, None, "fsdp")),
        ("y_embedder/embedding_table", (1001, 1152), P(None, "fsdp")),
        ("final_layer/linear/bias", (33,), P(None)),
        ("0/mu/blocks/mlp/fc1/kernel", (28, 1152, 4608), P(None, "fsdp", "tensor")),
        ("blocks/mlp/fc1/bias", (4, 7), P(None, None)),
    ],
)
def test_the_rule(path, shape, spec):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert parameter_spec(path, jax.ShapeDtypeStruct(shape, jnp.float32), mesh) == spec


def test_xl_2_is_spread_evenly():
    _, shapes = abstract_dit(DiTConfig.preset("DiT-XL/2"))
    shardings = state_sharding(make_mesh({"data": 1, "fsdp": 8}), shapes)
    sizes = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    total, held = 0, 0
    for leaf, sharding in sizes:
        total += math.prod(leaf.shape)
        held += math.prod(sharding.shard_shape(leaf.shape))
    assert held < 1.01 * total / 8


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_shares_are_parts_that_no_two_devices_hold_and_that_are_cut_where_they_lie(sizes):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    shapes = {"blocks/attn/qkv/kernel": (3, 32, 96), "blocks/attn/qkv/bias": (3, 96), "final/kernel": (32, 5)}
    tree = {name: jnp.arange(1.0 * math.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    tree = jax.device_put(tree, state_sharding(mesh, tree))
    program = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shares(tree))
    assert not re.search("all-gather|all-to-all|collective-permute|all-reduce", program.lower(tree).compile().as_text())
    for name, leaf in program(tree).items():
        held = [shard.data for shard in leaf.addressable_shards]
        assert {part.size for part in held} == {tree[name].size // 8}
        assert sorted(float(x) for part in held for x in part.ravel()) == list(range(tree[name].size))


def test_what_cannot_be_shared_out_stays_whole():
    tree = jax.device_put({"count": jnp.int32(3), "bias": jnp.zeros(7)}, NamedSharding(make_mesh({"data": 8}), P()))
    assert all(sharding.is_fully_replicated for sharding in shares(tree).values())


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    x = jax.device_put(jnp.zeros((8, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(("batch_size", "parts"), [(0, 1), (-8, 1), (6, 1), (4, 2), (8, 0)])
def test_a_batch_that_does_not_split_evenly_is_refused(batch_size, parts):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    require_shards(8, 2, mesh)
    with pytest.raises(InputError, match=r"expected at least 1|choose a multiple of (4|8)$"):
        require_shards(batch_size, parts, mesh)


def test_outside_a_mesh_nothing_is_constrained():
    x = jnp.ones((3, 2))
    assert shard_batch(x) is x


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_tokens_are_settled_where_they_are(sizes):
    tokens = jnp.arange(24.0).reshape(4, 3, 2)
    with jax.set_mesh(make_mesh(sizes)) if sizes else nullcontext():
        step = jax.jit(lambda x: jax.vjp(lambda x: settled(shard_batch(x)), x)[1](x)[0])
        program = step.lower(tokens).compile().as_text()
        np.testing.assert_array_equal(step(tokens), tokens)
    assert not re.search("all-(gather|reduce|to-all)|collective-permute", program)


def test_the_condition_is_split_by_rows_before_a_product_and_by_columns_after_it():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        c = jax.device_put(jnp.ones((8, 12)), batch_sharding(mesh))
        for function, spec in ((gather_batch, P("data")), (shard_features, P("data", "fsdp"))):
            assert jax.jit(function)(c).sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        odd = jax.device_put(jnp.ones((8, 7)), batch_sharding(mesh))  # columns that four devices cannot share
        assert jax.jit(shard_features)(odd).sharding.is_equivalent_to(odd.sharding, 2)


@pytest.mark.parametrize(("sizes", "copies"), [({"data": 8}, 0), ({"data": 1, "fsdp": 8}, 1)])
def test_a_scan_keeps_no_copies_of_weights_that_are_whole(sizes, copies):
    kernels, x = {"mlp/fc1/kernel": jnp.ones((5, 32, 32))}, jnp.ones((8, 32))

    def forward(kernels):
        body = lambda x, kernel: (x @ gather_parameters(kernel)["mlp/fc1/kernel"], None)  # noqa: E731
        return jax.lax.scan(body, x, kernels)[0].sum()

    with jax.set_mesh(make_mesh(sizes)):
        _, pullback = jax.vjp(forward, kernels)
        kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == kernels["mlp/fc1/kernel"].shape]
    assert sum(leaf is not kernels["mlp/fc1/kernel"] for leaf in kept) == copies


def test_the_condition_is_brought_together_once_for_all_blocks():
    """Brought together in each block, its gradient would be summed over the devices for each block too."""
    config = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5)
    graph, params = abstract_dit(config)

    def modulations(params: dict, c: jax.Array) -> tuple[jax.Array, ...]:
        return nnx.merge(graph, params).modulations(c)

    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 8})):
        text = str(jax.make_jaxpr(modulations)(params, jax.ShapeDtypeStruct((16, 32), jnp.float32)))
    constrained = re.findall(r"f32\[([\d,]+)\]\S* = sharding_constraint", text)
    assert "16,32" in constrained and "3,16,32" not in constrained
