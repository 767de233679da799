"""A checkpoint's writing, held back where the processors that do it are those that train."""

import asyncio
import math
import threading
import time
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp

READ, WRITTEN = 250e6, 25e6  # bytes per second: a rest that long comes after what was summed up, and what was written
PAUSE = 2.0  # seconds before the first thing is done
ASK_AGAIN = 0.25  # seconds; each array that waits does: every 0.1 s, and in threads, that took as much as writing


class PacedArrays(ocp.type_handlers.ArrayHandler):
    """Orbax's, which writes all arrays at once, but for the pace that the next save is to keep, if any."""

    pace: "Pace | None" = None

    async def serialize(
        self,
        values: Sequence[jax.Array],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        if self.pace:
            for info in infos:
                info.byte_limiter = self.pace
        return await super().serialize(values, infos, args)


class Pace:
    """One array, or a device's part of one, is written at a time, with rests between, until `hurry` is set.

    To Orbax it is the limit on bytes in flight, which it asks from several threads.
    """

    def __init__(self):
        self.hurry = threading.Event()
        self._lock, self._next = threading.Lock(), 0.0

    def pause(self) -> None:
        """Before anything else: the step after the copy has had its share."""
        self.hurry.wait(PAUSE)

    def rest(self, size: int) -> None:
        """After so many bytes were summed up."""
        self.hurry.wait(size / READ)

    async def wait_for_bytes(self, requested_bytes: int) -> None:
        while not self.hurry.is_set() and not self._my_turn():
            await asyncio.sleep(ASK_AGAIN)

    async def release_bytes(self, requested_bytes: int) -> None:
        self._next = time.monotonic() + requested_bytes / WRITTEN

    def _my_turn(self) -> bool:
        with self._lock:
            if time.monotonic() < self._next:
                return False
            self._next = math.inf  # until it is written
            return True
