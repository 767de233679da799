"""Batches for training: the batch at step s is a function of (seed, s) alone, however many processes share it."""

import atexit
import collections
import dataclasses
import functools
import itertools
import multiprocessing
import queue
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import grain
import jax
import numpy as np

from dit_jax.data.sources import CorruptImageError, Source
from dit_jax.data.transforms import normalise, to_pixels
from dit_jax.errors import InputError

Batch = dict[str, Any]
Rows = dict[str, np.ndarray]  # {"x": uint8 (b, S, S, C), "y": int32 (b,), "skipped": int32 (b,)}

BATCHES_AHEAD = 2
READ_SIZE = 16  # records: small enough to stop at once, large enough that handing them over costs nothing


class Loader:
    """Shuffled batches without end: every epoch in its own order, none of its records dropped.

    Row r of the global batch at step s is record number s * batch_size + r of the endless shuffled sequence, so it
    depends on nothing but the seed. A process reads only its own rows of it.

    Args:
      source: the labelled images.
      image_size: side of the square images, pixels; `center_crop` makes them.
      batch_size: rows of the global batch, over all processes.
      seed: of the order and of the flips.
      flip: mirror each image left to right with probability 1/2.
      skip_corrupt: put the next readable record in the place of one that cannot be decoded, and count it in `skipped`,
        instead of stopping with CorruptImageError.
      threads: readers in this process.
      workers: processes that read instead of the threads, 0 for none. They are spawned, so that a script that
        uses them needs its `if __name__ == "__main__"`.
      sharding: of the batch axis, as NamedSharding(mesh, P(("data", "fsdp"))). Batches are then global jax.Arrays, and
        this process reads the rows that its own devices hold, wherever the mesh has put those.
      process_index, process_count: without a sharding, this process reads block `process_index` of `process_count`
        equal blocks of rows; jax's own by default.

    Raises:
      InputError: batch_size is no multiple of the processes or of the shards, a number is out of range, or the source
        is empty.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        flip: bool = False,
        skip_corrupt: bool = False,
        threads: int = 4,
        workers: int = 0,
        sharding: jax.sharding.Sharding | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        if min(image_size, batch_size, threads) < 1 or min(seed, workers) < 0:
            raise InputError(
                f"found image_size={image_size}, batch_size={batch_size}, seed={seed}, threads={threads}, "
                f"workers={workers}: seed and workers must be 0 or more, the others 1 or more"
            )
        if not len(source):
            raise InputError(f"{source!r} holds no records: nothing to train on")
        self.source, self.batch_size, self.sharding = source, batch_size, sharding
        self.threads, self.workers = threads, workers
        self.skipped = 0
        if sharding is None:
            index = jax.process_index() if process_index is None else process_index
            count = jax.process_count() if process_count is None else process_count
            self.rows = _block_of_rows(batch_size, index, count)
        else:
            self.rows = _rows_of_sharding(batch_size, sharding)
        self.open_records = functools.partial(_shuffled_records, source, image_size, seed, flip, skip_corrupt)

    def batches(self, start_step: int) -> "Batches":
        """Batches from `start_step` on, found without reading those before: {"x": (b, H, W, C) float32 in [-1, 1],
        "y": (b,) int32}, global jax.Arrays with b = batch_size given a sharding, numpy rows of this process otherwise.

        Iterating raises CorruptImageError at an unreadable image, unless skip_corrupt; InputError at a label outside
        the classes. Use it as a context manager, or call `close`, so that its threads and processes end.
        """
        return Batches(self, start_step)

    def reads(self, start_step: int) -> Iterator[list[int]]:
        """Indices into the shuffled sequence, a few at a time, that make up this process's batches from a step on."""
        for step in itertools.count(start_step):
            for first in range(0, len(self.rows), READ_SIZE):
                yield [step * self.batch_size + row for row in self.rows[first : first + READ_SIZE]]

    def assemble(self, reads: Iterator[Rows]) -> tuple[Batch, int]:
        """The reads of a batch -> the batch, on the devices if there is a sharding, and how many images it skipped."""
        parts = list(itertools.islice(reads, -(-len(self.rows) // READ_SIZE)))
        x, y, skipped = (np.concatenate([part[name] for part in parts]) for name in ("x", "y", "skipped"))
        batch = {"x": normalise(x), "y": y}
        if self.sharding is not None:
            batch = {name: self._globally(values) for name, values in batch.items()}
        return batch, int(skipped.sum())

    def _globally(self, values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self.batch_size)
            first = np.searchsorted(self.rows, start)
            return values[first : first + stop - start]

        return jax.make_array_from_callback((self.batch_size, *values.shape[1:]), self.sharding, shard)


class Batches(Iterator[Batch]):
    """An iterator that prepares batches ahead, with threads and processes of its own until `close`."""

    def __init__(self, loader: Loader, start_step: int):
        self._loader = loader
        readers = loader.workers or loader.threads
        workers = [_Workers(loader.workers, loader.open_records)] if loader.workers else []
        read = workers[0].read if workers else functools.partial(_read, loader.open_records())
        executor, self._assembler = ThreadPoolExecutor(readers, "read"), ThreadPoolExecutor(1, "batches")
        self.close = weakref.finalize(self, _close, executor, self._assembler, *workers)
        # After the hook of multiprocessing, to run before it: that one waits for workers that wait for this one.
        atexit.register(self.close)
        self._reads = _in_order(executor, read, loader.reads(start_step), 2 * readers)
        self._pending = collections.deque(self._next_batch() for _ in range(BATCHES_AHEAD))

    def __next__(self) -> Batch:
        if not self.close.alive:
            raise StopIteration
        try:
            batch, skipped = self._pending.popleft().result()
        except BaseException:
            # The batches behind a failed one no longer belong to their steps.
            self.close()
            raise
        self._pending.append(self._next_batch())
        self._loader.skipped += skipped
        return batch

    def _next_batch(self) -> Future[tuple[Batch, int]]:
        return self._assembler.submit(self._loader.assemble, self._reads)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _close(*parts: "Executor | _Workers") -> None:
    for part in parts:
        part.shutdown(wait=True, cancel_futures=True)


def _in_order(
    executor: Executor, read: Callable[[list[int]], Rows], tasks: Iterable[list[int]], ahead: int
) -> Iterator[Rows]:
    # Few reads in flight rather than all of them: what is queued when a program ends must still be waited for.
    pending = collections.deque()
    for task in tasks:
        pending.append(executor.submit(read, task))
        if len(pending) >= ahead:
            yield pending.popleft().result()


def _read(records: grain.MapDataset, indices: list[int]) -> Rows:
    found = [records[index] for index in indices]
    return {name: np.stack([record[name] for record in found]) for name in found[0]}


class _Workers:
    """Processes that read, each at the end of a pipe of its own: whichever side dies, the other sees the pipe close."""

    def __init__(self, count: int, open_records: Callable[[], grain.MapDataset]):
        spawn = multiprocessing.get_context("spawn")  # forking a process that runs JAX can deadlock it
        self._processes, self._connections, self._idle = [], [], queue.SimpleQueue()
        # Ctrl-C and a scheduler's SIGTERM reach the whole process group, but it is for the trainer to decide when
        # reading ends: workers inherit this mask, which the start of the resource tracker would lift again.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for _ in range(count):
                ours, theirs = spawn.Pipe()
                process = spawn.Process(target=_serve, args=(theirs, open_records), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
                self._idle.put(ours)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def read(self, indices: list[int]) -> Rows:
        connection = self._idle.get()
        try:
            connection.send(indices)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "a process that reads data has died, perhaps for lack of memory: lower workers"
            ) from error
        finally:
            self._idle.put(connection)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def shutdown(self, **_) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def _serve(connection: Connection, open_records: Callable[[], grain.MapDataset]) -> None:
    records = open_records()
    while True:
        try:
            indices = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = _read(records, indices)
        except Exception as error:
            answer = error
        connection.send(answer)


def _shuffled_records(
    source: Source, image_size: int, seed: int, flip: bool, skip_corrupt: bool
) -> grain.MapDataset[dict[str, np.ndarray]]:
    # Grain shuffles epoch e with seed + e: without the mixing, seeds 0 and 1 would share all epochs but one.
    shuffle_seed, flip_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    records = grain.MapDataset.source(_Pixels(source, image_size, skip_corrupt)).shuffle(shuffle_seed).repeat()
    return records.map_with_index(_Flip(flip_seed)) if flip else records


@dataclasses.dataclass
class _Pixels:
    """The source as Grain reads it: {"x": uint8 (S, S, C), "y": int32, "skipped": int32} by record index."""

    source: Source
    image_size: int
    skip_corrupt: bool

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        skipped = 0
        while True:
            found = (index + skipped) % len(self.source)
            try:
                record = self.source[found]
                break
            except CorruptImageError as error:
                skipped += 1
                if not self.skip_corrupt:
                    raise
                if skipped == len(self.source):
                    raise InputError(f"not one of the {skipped} images of {self.source!r} can be decoded") from error
        classes = len(self.source.class_names)
        if not 0 <= record["label"] < classes:
            raise InputError(
                f"record {found} of {self.source!r} has the label {record['label']}: expected 0 to {classes - 1}, "
                f"for it names {classes} classes"
            )
        x = to_pixels(record["image"], self.image_size)
        return {"x": x, "y": np.int32(record["label"]), "skipped": np.int32(skipped)}


@dataclasses.dataclass
class _Flip(grain.transforms.MapWithIndex):
    seed: int

    def map_with_index(self, index: int, element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if np.random.SeedSequence((self.seed, index)).generate_state(1)[0] & 1:
            element = element | {"x": element["x"][:, ::-1]}
        return element


def _block_of_rows(batch_size: int, index: int, count: int) -> list[int]:
    if batch_size % count:
        raise InputError(
            f"batch_size={batch_size} cannot be split over {count} processes: choose a multiple of {count}"
        )
    local = batch_size // count
    return list(range(index * local, (index + 1) * local))


def _rows_of_sharding(batch_size: int, sharding: jax.sharding.Sharding) -> list[int]:
    try:
        indices = sharding.addressable_devices_indices_map((batch_size,))
    except ValueError as error:
        raise InputError(
            f"batch_size={batch_size} cannot be split over the mesh ({sharding}): choose a multiple of its batch shards"
        ) from error
    return sorted({row for (index,) in indices.values() for row in range(*index.indices(batch_size))})
