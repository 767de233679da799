"""The state as it is after a step, to be written while training changes it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.parallel.chips import live_bytes

Tree = Any

LEAVE = 0.1  # of a device's memory, for what else a run does: previews, evaluation


def snapshot(step: Callable, arguments: tuple, tree: Tree) -> Tree:
    """A copy of the tree, spread alike, that is there once the devices have done what they were given before.

    It lies on the devices where there is room for it beside what `step`, the jitted training step, takes with its
    arguments: the next step then waits only until it is made. Otherwise it lies in the hosts' memory, and the next
    step waits until it has got there.
    """
    if has_room(step, arguments, tree):
        return _copies(tree)
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), tree))


def has_room(step: Callable, arguments: tuple, tree: Tree) -> bool:
    """Whether each device can hold its part of the tree once more. A CPU can: there both places are the same."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return True
    parts = (math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    taken = live_bytes(step.lower(*arguments).compile())  # of a step that has run: nothing is compiled anew
    return taken + sum(parts) <= (1 - LEAVE) * limit


@jax.jit
def _copies(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)
