"""Who holds what: the one place that knows how arrays lie on the mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = P(("data", "fsdp"))

# Megatron: the first matrix of a pair is split by its outputs, the second by its inputs (Shoeybi et al. 2019, sec. 3).
# Paths end so; axes count from the back, so that they hold for one block and for the stack of them.
TENSOR_AXIS = {
    "attn/qkv/kernel": -1,
    "attn/qkv/bias": -1,
    "attn/proj/kernel": -2,
    "mlp/fc1/kernel": -1,
    "mlp/fc1/bias": -1,
    "mlp/fc2/kernel": -2,
}


def shard_batch(x: jax.Array) -> jax.Array:
    """Keep the leading axis of x split over data and fsdp; does nothing outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Shardings for a pytree of arrays or shapes that holds parameters, their averages or their moments.

    One rule by path and shape serves them all, because an optimiser's moments keep the paths of their parameters.
    """

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, mesh))

    return jax.tree_util.tree_map_with_path(rule, tree)


def parameter_spec(path: str, leaf: Any, mesh: Mesh) -> P:
    """Tensor-parallel axis by name; of the others, the largest that fsdp divides; never the depth of the stack."""
    axes: list[str | None] = [None] * leaf.ndim
    for suffix, axis in TENSOR_AXIS.items():
        if path.endswith(suffix) and leaf.shape[axis] % mesh.shape["tensor"] == 0:
            axes[axis] = "tensor"
    depth_axes = 1 if "blocks/" in path else 0
    free = [i for i in range(depth_axes, leaf.ndim) if axes[i] is None and leaf.shape[i] % mesh.shape["fsdp"] == 0]
    if free:
        axes[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
    return P(*axes)
