"""Batches for training: the batch at step s is a function of (seed, s) alone, however many processes share it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle

from dit_jax.data.sources import CorruptImageError, Source
from dit_jax.data.transforms import normalise, to_pixels
from dit_jax.data.words import Words
from dit_jax.errors import InputError

Batch = dict[str, Any]
Record = dict[str, Any]  # {"x": float32 (S, S, C) or moments, "y": int, "skipped": int}, and a context

BATCHES_AHEAD = 2
READ_SIZE = 16  # records at most: few, to end soon when closed; several, for Grain's own cost a read


@dataclasses.dataclass
class Records:
    """A source as Grain reads it: {"x": float32 (S, S, C) in [-1, 1], or moments as they are, "y", "skipped"}."""

    source: Source
    image_size: int
    skip_corrupt: bool

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
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
        x = record["moments"] if "moments" in record else normalise(to_pixels(record["image"], self.image_size))
        return {"x": x, "y": record["label"], "skipped": skipped}


class Loader:
    """Shuffled batches without end: every epoch in its own order, none of its records dropped.

    Row r of the global batch at step s is record number s * batch_size + r of the endless shuffled sequence, so it
    depends on nothing but the seed. A process reads only its own rows of it.

    Args:
      source: the labelled images.
      image_size: side of the square images, pixels; `center_crop` makes them.
      batch_size: rows of the global batch, over all processes.
      seed: of the order, the flips and the phrases.
      flip: mirror each image left to right with probability 1/2.
      context: what tells the model of an image beside its label.
      skip_corrupt: put the next readable record in the place of one that cannot be decoded, and count it in `skipped`,
        instead of stopping with CorruptImageError.
      threads: readers in this process; Pillow decodes and resizes without holding Python's lock.
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
        context: Words | None = None,
        skip_corrupt: bool = False,
        threads: int = 4,
        sharding: jax.sharding.Sharding | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        if min(image_size, batch_size, threads) < 1 or seed < 0:
            raise InputError(
                f"found image_size={image_size}, batch_size={batch_size}, seed={seed}, threads={threads}: "
                "seed must be 0 or more, the others 1 or more"
            )
        if not len(source):
            raise InputError(f"{source!r} holds no records: nothing to train on")
        self.threads, self.sharding = threads, sharding
        self.skipped = 0
        if sharding is None:
            index = jax.process_index() if process_index is None else process_index
            count = jax.process_count() if process_count is None else process_count
            self.rows = _block_of_rows(batch_size, index, count)
        else:
            self.rows = _rows_of_sharding(batch_size, sharding)
        read_size = math.gcd(len(self.rows), READ_SIZE)
        self.reads_per_batch = len(self.rows) // read_size
        records = Records(source, image_size, skip_corrupt)
        self.reads = grain.MapDataset.source(_Reads(records, batch_size, self.rows, seed, flip, context, read_size))

    def batches(self, start_step: int) -> closing[Iterator[Batch]]:
        """Batches from `start_step` on, found without reading those before: {"x": (b, H, W, C) float32 in [-1, 1],
        "y": (b,) int32}, with a context also {"context": (b, L, F) float32, "context_mask": (b, L) bool}; global
        jax.Arrays with b = batch_size given a sharding, numpy rows of this process otherwise.

            with loader.batches(start_step) as batches:
                batch = next(batches)

        Threads read ahead from the first batch on, until the `with` ends or an error is raised: CorruptImageError at an
        unreadable image, unless skip_corrupt; InputError at a label outside the classes.
        """
        return closing(self._iterate(start_step))

    def _iterate(self, start_step: int) -> Iterator[Batch]:
        ahead = max(self.threads, BATCHES_AHEAD * self.reads_per_batch)
        reads = (
            self.reads[start_step * self.reads_per_batch :]
            .to_iter_dataset(grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=ahead))
            .batch(self.reads_per_batch, batch_fn=_stack)
        )
        with closing(iter(reads)) as batches:
            for batch in batches:
                self.skipped += int(batch.pop("skipped").sum())
                if self.sharding is not None:
                    batch = jax.make_array_from_process_local_data(self.sharding, batch)
                yield batch


@dataclasses.dataclass
class _Reads:
    """The endless shuffled sequence of records, of which this process reads its rows of the global batches, in order
    and several at once.

    Every record of an epoch comes once, in an order of its own. Grain's own chain of datasets gives the same sequence
    at many times the cost a record, which is what limits a host that feeds several chips with latents: while one
    thread runs Python, the others wait.
    """

    records: Records
    batch_size: int
    rows: list[int]
    seed: int
    flip: bool
    context: Words | None
    read_size: int  # divides the number of rows

    def __post_init__(self):
        # Epoch e is shuffled with a seed plus e: without the mixing, seeds 0 and 1 would share all epochs but one.
        seeds = np.random.SeedSequence(self.seed).generate_state(3)
        self.shuffle_seed, self.flip_seed, self.context_seed = (int(seed) for seed in seeds)

    def __len__(self) -> int:
        return 2**58  # without end, but Grain asks for a number

    def __getitem__(self, read: int) -> list[Record]:
        step, row = divmod(read * self.read_size, len(self.rows))
        return [self._record(step * self.batch_size + place) for place in self.rows[row : row + self.read_size]]

    def _record(self, place: int) -> Record:
        epoch, place_in_epoch = divmod(place, len(self.records))
        seed = (self.shuffle_seed + epoch) % 2**32
        shuffled = index_shuffle(place_in_epoch, max_index=len(self.records) - 1, seed=seed, rounds=4)
        record = self.records[shuffled]
        if self.flip and _chance(self.flip_seed, place) & 1:
            record = record | {"x": record["x"][:, ::-1]}
        if self.context is not None:
            record = record | self.context.of_record(record["y"], _chance(self.context_seed, place))
        return record


def _chance(seed: int, place: int) -> int:
    """A number of 32 bits, a function of its arguments."""
    return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])


def _stack(reads: Sequence[list[Record]]) -> Batch:
    records = [record for read in reads for record in read]
    columns = {name: [record[name] for record in records] for name in records[0]}
    return {
        name: np.stack(column) if isinstance(column[0], np.ndarray) else np.array(column, np.int32)
        for name, column in columns.items()
    }


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
