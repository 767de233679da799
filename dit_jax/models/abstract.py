"""Modules without their arrays."""

from collections.abc import Callable

import jax
from flax import nnx


def abstract(build: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """What `build` makes without its arrays, and the nested dict of their shapes: `nnx.merge` of the first with such a
    dict of arrays is the module.

    Nothing is computed, and neither of the two knows of the mesh on which it was asked for, so that all can share them.
    """
    graph, params = nnx.split(nnx.eval_shape(build), nnx.Param)
    # Made anew, since under `jax.set_mesh` JAX writes the mesh into a shape.
    return graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(params))
