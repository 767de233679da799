"""What a compiled program leaves of a device's memory."""

import math
from collections.abc import Callable
from typing import Any

import jax

from dit_jax.parallel.sharding import shares

LEAVE = 0.1  # of a device's memory, for what else a run does: previews, evaluation


def live_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a compiled program takes of each device while it runs, its arguments and outputs included."""
    sizes = program.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + outputs + sizes.temp_size_in_bytes


def has_room(tree: Any, program: Callable, *arguments: Any) -> bool:
    """Whether each device can hold its share of a copy of the tree beside what a jitted program, which has run with
    such arguments, takes. A CPU, whose memory nobody limits, can."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return True
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shares(tree)), strict=True)
    parts = (math.prod(share.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, share in leaves)
    taken = live_bytes(program.lower(*arguments).compile())  # which JAX still has: nothing is compiled anew
    return taken + sum(parts) <= (1 - LEAVE) * limit
