"""A number that any changed bit of any array changes, the same however the arrays lie on a mesh.

TensorStore keeps none of the large arrays: a flipped bit on the disk would be read as a weight. Of an array of 4-byte
numbers it is the sum of all, each times 2 p + 1 where p is its place in the flattened array; modulo 2^32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any

CHUNK = 2**17  # numbers that are summed up at once, few enough to stay in a processor's cache


def checksum(tree: Tree) -> int:
    """By this thread if the arrays lie in its memory, else by their devices."""
    return by_this_thread(tree) if in_memory(tree) else int(by_devices(tree))


def in_memory(tree: Tree) -> bool:
    """Whether all arrays are this process's, and NumPy's or on CPU devices."""
    return all(
        isinstance(leaf, np.ndarray)
        or (leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices()))
        for leaf in jax.tree.leaves(tree)
    )


def by_this_thread(tree: Tree, rest: Callable[[int], None] | None = None) -> int:
    """Without the threads that compute the programs: beside a training step these wait for it, and it for them.

    rest: told the bytes of each array when it has been summed up.
    """
    total, odd = 0, 2 * np.arange(CHUNK, dtype=np.uint32) + 1
    products = np.empty_like(odd)  # once: new memory for each would take the place that a training step has its own in
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        numbers = np.asarray(leaf).reshape(-1).view(np.uint32)
        total = total * 31 + i
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            np.multiply(chunk, odd[: len(chunk)], out=products[: len(chunk)])
            total += int(np.sum(products[: len(chunk)], dtype=np.uint32))
            total += 2 * start * int(np.sum(chunk, dtype=np.uint32))
        if rest:
            rest(numbers.nbytes)
    return total % 2**32


@jax.jit
def by_devices(tree: Tree) -> jax.Array:
    """() uint32. Each device sums up what it has; nothing is gathered."""
    total = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        total = total * 31 + _weighted_sum(jax.lax.bitcast_convert_type(leaf, jnp.uint32)) + i
    return total


def _weighted_sum(x: jax.Array) -> jax.Array:
    """One axis after the other: a CPU sums whole rows eight times as fast as it sums numbers to one."""
    if x.ndim == 0:
        return x
    places = jnp.arange(len(x), dtype=jnp.uint32).reshape(-1, *[1] * (x.ndim - 1))
    if x.ndim == 1:
        return jnp.sum(x * (2 * places + 1), dtype=jnp.uint32)
    sums = jnp.sum(x, axis=0, dtype=jnp.uint32), jnp.sum(x * places, axis=0, dtype=jnp.uint32)
    across, along = jax.lax.optimization_barrier(sums)  # or XLA joins this sum and the next one
    return _weighted_sum(across) + 2 * math.prod(x.shape[1:]) * jnp.sum(along, dtype=jnp.uint32)
