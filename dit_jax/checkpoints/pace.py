"""A checkpoint's writing, held back where the processors that do it are those that train."""

import asyncio
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Sequence
from os import PathLike

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import replica_slices, types  # without public names, see their uses

READ, WRITTEN = 250e6, 25e6  # bytes per second: a rest that long comes after what was summed up, and what was written
PART = 2e6  # bytes: no part of an array that is written at once is smaller; 42 MB took as long as a step of S/8
ONE_ARRAY = 1e-9  # GB: one that is larger still goes by itself
PAUSE = 2.0  # seconds before the first thing is done
ASK_AGAIN = 0.25  # seconds; each part that waits does: every 0.1 s, and in threads, that took as much as writing
BETWEEN = 0.25  # seconds between the trees' beginnings, and their ends: those of three take 10% of a step of S/8


class PacedTrees(ocp.PyTreeCheckpointHandler):
    """Orbax's, which writes all arrays of all trees at once, but for the pace that the next save is to keep, if any."""

    pace: "Pace | None" = None

    def __init__(self):
        arrays = jax.Array, _PacedArrays(self)
        super().__init__(
            # Compression makes weights 8% smaller, and takes four times the processor that writing them does.
            use_compression=False,
            save_device_host_concurrent_gb=ONE_ARRAY,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(arrays),
        )

    async def async_save(self, *args, **options) -> list[ocp.future.Future] | None:
        if self.pace:
            await self.pace.wait_to_begin()
        return await super().async_save(*args, **options)

    def finalize(self, directory: PathLike) -> None:
        if self.pace:
            self.pace.wait_to_end()
        super().finalize(directory)

    @classmethod
    def typestr(cls) -> str:
        """What a checkpoint says it was written by: whatever reads Orbax's reads these."""
        return ocp.PyTreeCheckpointHandler.typestr()


class _PacedArrays(ocp.type_handlers.ArrayHandler):
    """The arrays of `PacedTrees`: one part at a time, by the limiter that Orbax asks for each."""

    def __init__(self, trees: PacedTrees):
        # Processes that hold copies of an array share its writing, each a slice: of small ones that costs more, a
        # program compiled for each slice, than it saves.
        super().__init__(min_slice_bytes_for_replica_parallel=2**20, callback=_Priorities(trees))
        self._trees = trees

    async def serialize(
        self,
        values: Sequence[jax.Array],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        if self._trees.pace:
            for info in infos:
                info.byte_limiter = self._trees.pace
        return await super().serialize(values, infos, args)


class _Priorities(types.DefaultSerializationStatusCallback):
    """With a pace, an array of a tree is begun when the one before is written: all at once take 0.1 s of a processor.

    Orbax does so where its handler's limit is `ONE_ARRAY`.
    """

    def __init__(self, trees: PacedTrees):
        self._trees = trees

    def key_priority(self, keypath) -> types.TransferPriority:
        priorities = types.TransferPriority
        return priorities.ASYNCHRONOUS_DEPRIORITIZED if self._trees.pace else priorities.SYNCHRONOUS


# Of each tree Orbax warns then that no array comes first.
logging.getLogger("absl").addFilter(lambda record: not record.getMessage().startswith("No prioritized params found"))


class Pace:
    """One part of an array is written at a time, with rests between, until `hurry` is set.

    To Orbax it is the limit on bytes in flight, which it asks from several threads.
    """

    def __init__(self):
        self.hurry = threading.Event()
        self._lock, self._next = threading.Lock(), 0.0

    def pause(self) -> None:
        """Before anything else: the step after the copy has had its share."""
        self.hurry.wait(PAUSE)

    async def wait_to_begin(self) -> None:
        """Before a tree is begun: the first one at once, others in turn with the parts of those before."""
        await self._wait_for_turn()
        self._next = time.monotonic() + BETWEEN

    def wait_to_end(self) -> None:
        """Before a tree is ended, all of which is written."""
        self.hurry.wait(BETWEEN)

    def rest(self, size: int) -> None:
        """After so many bytes were summed up or deleted."""
        self.hurry.wait(size / READ)

    async def wait_for_bytes(self, requested_bytes: int) -> None:
        await self._wait_for_turn()

    async def release_bytes(self, requested_bytes: int) -> None:
        self._next = time.monotonic() + requested_bytes / WRITTEN

    async def _wait_for_turn(self) -> None:
        while not self.hurry.is_set() and not self._my_turn():
            await asyncio.sleep(ASK_AGAIN)

    def _my_turn(self) -> bool:
        with self._lock:
            if time.monotonic() < self._next:
                return False
            self._next = math.inf  # until it is written
            return True


def _in_parts(array: replica_slices.ReplicaSlices) -> replica_slices.ReplicaSlices:
    """What Orbax is to write of an array: of one on CPUs as many equal slices of its first axis as `PART` allows."""
    shape = array.local_shape
    if not shape or next(iter(array.sharding.device_set)).platform != "cpu":
        return array
    size = math.prod(shape) * array.dtype.itemsize
    parts = max(n for n in range(1, shape[0] + 1) if n == 1 or (shape[0] % n == 0 and size / n >= PART))
    rows, slices = shape[0] // parts, []
    for whole in array.replica_slices:
        for first in range(0, shape[0], rows):
            start = (whole.index[0].start or 0) + first
            index = (slice(start, start + rows), *whole.index[1:])
            data = whole.unsliced_data[first : first + rows]
            slices.append(dataclasses.replace(whole, index=index, unsliced_data=data))
    return dataclasses.replace(array, local_shape=(rows, *shape[1:]), replica_slices=slices)


# Orbax asks its limiter once for each slice, and has no setting for how large they are.
_on_host = replica_slices.transfer_arrays_to_host
replica_slices.transfer_arrays_to_host = lambda *args, **options: [_in_parts(a) for a in _on_host(*args, **options)]
