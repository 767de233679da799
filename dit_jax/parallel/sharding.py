"""Who holds what: the one place that knows how arrays lie on the mesh."""

import math
from itertools import chain
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.errors import InputError

BATCH = P(("data", "fsdp"))
TOKENS = P(("data", "fsdp"), None, "tensor")  # (B, N, features), split by heads or by the MLP's hidden features

# Megatron: the first matrix of a pair is split by its outputs, the second by its inputs (Shoeybi et al. 2019, sec. 3).
# Paths end so; axes count from the back, so that they hold for one block and for the stack of them.
TENSOR_AXIS = {
    "attn/qkv/kernel": -1,
    "attn/qkv/bias": -1,
    "attn/q/kernel": -1,  # of cross-attention
    "attn/q/bias": -1,
    "attn/kv/kernel": -1,
    "attn/kv/bias": -1,
    "attn/proj/kernel": -2,
    "mlp/fc1/kernel": -1,
    "mlp/fc1/bias": -1,
    "mlp/fc2/kernel": -2,
}


def require_shards(batch_size: int, parts: int, mesh: Mesh) -> None:
    """Raise InputError unless a batch can be split over data and fsdp in each of `parts` equal parts."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if parts < 1:
        raise InputError(f"accumulate={parts}: expected at least 1")
    if batch_size < 1 or batch_size % (shards * parts):
        raise InputError(
            f"batch_size={batch_size} cannot be split over {shards} shards (data x fsdp) with accumulate={parts}: "
            f"choose a multiple of {shards * parts}"
        )


def shard_batch(x: jax.Array) -> jax.Array:
    """Keep the leading axis of x split over data and fsdp; does nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def settled(x: jax.Array) -> jax.Array:
    """x (B, ...) as an iteration of a loop hands it to the next: rounded to its dtype, and lying row by row.

    Otherwise XLA's GPU compiler writes tokens in float32 beside bfloat16, or column by column: a step of XL/2 with 32
    images moves 130 GB on an H100 so, and 109 with this.
    """

    def settle(x: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(range(x.ndim))))

    if jax.sharding.get_abstract_mesh().empty:
        return settle(x)
    return jax.shard_map(settle, in_specs=BATCH, out_specs=BATCH)(x)  # of a constrained whole, all would get all of it


def replicate(x: jax.Array) -> jax.Array:
    """Give every device the whole of x, so that each process can read it; does nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P())


def gather_batch(x: jax.Array) -> jax.Array:
    """Bring the rows of x (B, D) together over fsdp, for a product with a matrix that stays scattered there."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P("data"))


def shard_features(x: jax.Array) -> jax.Array:
    """Keep the result (B, D) of such a product where its columns were made."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[-1] % mesh.shape["fsdp"]:
        return x
    return jax.lax.with_sharding_constraint(x, P("data", "fsdp"))


def gather_parameters(tree: Any) -> Any:
    """Parameters brought together over fsdp as they are used; their gradients are summed and scattered in one go.

    Those that are whole already stay the arrays that they are: a scan need not keep copies of them for its gradient.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return tree

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        scattered, whole = parameter_spec(path_name(path), leaf, mesh), P(*_tensor_axes(path_name(path), leaf, mesh))
        gathered = jax.custom_vjp(lambda leaf: jax.lax.with_sharding_constraint(leaf, whole))
        gathered.defvjp(
            lambda leaf: (gathered(leaf), None),
            lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, scattered),),
        )
        return gathered(leaf)

    return jax.tree_util.tree_map_with_path(gather, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Shardings for a pytree of arrays or shapes that holds parameters, their averages or their moments.

    One rule by path and shape serves them all, because an optimiser's moments keep the paths of their parameters.
    """

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(path_name(path), leaf, mesh))

    return jax.tree_util.tree_map_with_path(rule, tree)


def parameter_spec(path: str, leaf: Any, mesh: Mesh) -> P:
    """Tensor-parallel axis by name; of the others, the largest that fsdp divides; never the depth of the stack."""
    axes = _tensor_axes(path, leaf, mesh)
    depth_axes = 1 if "blocks/" in path else 0
    free = [i for i in range(depth_axes, leaf.ndim) if axes[i] is None and leaf.shape[i] % mesh.shape["fsdp"] == 0]
    if free:
        axes[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
    return P(*axes)


def shares(tree: Any) -> Any:
    """Shardings of arrays that lie on a mesh under which no two devices hold the same part: where some do, that part is
    split between them along its largest axis that they divide. An array with no such axis keeps its sharding."""

    def rule(leaf: jax.Array) -> NamedSharding:
        mesh, spec = leaf.sharding.mesh, [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
        split = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in spec]
        others = tuple(name for name in mesh.axis_names if name not in chain(*split))
        part, holders = leaf.sharding.shard_shape(leaf.shape), math.prod(mesh.shape[name] for name in others)
        if free := [i for i in range(leaf.ndim) if part[i] % holders == 0]:
            i = max(free, key=lambda i: part[i])
            spec[i] = (*split[i], *others)
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(rule, tree)


def _tensor_axes(path: str, leaf: Any, mesh: Mesh) -> list[str | None]:
    axes: list[str | None] = [None] * leaf.ndim
    for suffix, axis in TENSOR_AXIS.items():
        if path.endswith(suffix) and leaf.shape[axis] % mesh.shape["tensor"] == 0:
            axes[axis] = "tensor"
    return axes


def path_name(path: tuple) -> str:
    """The path of a leaf as `blocks/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")  # of a module's parameters
