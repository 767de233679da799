"""What a compiled program leaves of a device's memory."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax

from dit_jax.parallel import processes
from dit_jax.parallel.sharding import shares

LEAVE = 0.1  # of a device's memory, for what else a run does: previews, evaluation


def live_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a compiled program takes of each device while it runs, its arguments and outputs included."""
    sizes = program.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + outputs + sizes.temp_size_in_bytes


def memory_for_copy(tree: Any, program: Callable, *arguments: Any) -> str | None:
    """Where a copy of the tree finds room beside what a jitted program, which has run with such arguments, takes.

    "device" if each can hold its share, otherwise "pinned_host" (JAX's names), which CPUs do not have beside it: None.
    The same in all processes, which call this together.
    """
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shares(tree)), strict=True)
    parts = (math.prod(share.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, share in leaves)
    taken = live_bytes(program.lower(*arguments).compile())  # which JAX still has: nothing is compiled anew
    room = taken + sum(parts) <= (1 - LEAVE) * device_bytes()
    if all(answer == "yes" for answer in processes.gather("yes" if room else "no")):
        return "device"
    return None if jax.default_backend() == "cpu" else "pinned_host"


def device_bytes() -> float:
    """Memory of a device; of a CPU device its share of this machine's."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return math.inf
