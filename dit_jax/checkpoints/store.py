"""The checkpoints of a training run: Orbax, in the background, restored onto any mesh."""

import logging
import mmap
import re
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dit_jax.checkpoints import checksums
from dit_jax.checkpoints.pace import Pace, PacedTrees
from dit_jax.errors import InputError
from dit_jax.files import require_renaming
from dit_jax.parallel import processes
from dit_jax.parallel.sharding import shares

Tree = Any
OUTDATED = "outdated"  # folder of checkpoints that are to be deleted
IDLE = 20.0  # seconds after which memory that is kept is read again


class Restored(NamedTuple):
    """A checkpoint as read: its step, its record and its trees by name."""

    step: int
    record: dict
    trees: dict[str, Tree]


class CheckpointStore:
    """Checkpoints of a run by step, each of several trees of arrays and a JSON record.

    Trees are stored apart, so that sampling reads the averaged weights and nothing else. Every device writes its own
    shards, and restoring follows the shardings asked for. A checkpoint appears whole or not at all. With several
    processes, all of them call these functions.

    Saving is Orbax's from its first barrier to its last rename, in a thread, so that training need not wait for it.
    """

    def __init__(self, folder: str | Path, *, keep: int | None = None, keep_every: int = 0, write: bool = True):
        """keep: newest checkpoints that stay; None keeps all. keep_every: steps whose multiples stay for ever.

        write: whether this process is the one that saves here; it then clears away what a killed save left behind.
        """
        self.folder = Path(folder).absolute()
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not any(self.folder.iterdir()):
                require_renaming(self.folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            todelete_subdir=OUTDATED,
            create=False,
            cleanup_tmp_directories=write,
            enable_async_checkpointing=False,
            # Orbax waits for named processes by the network alone, otherwise on the devices, between training's steps.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
        )
        registry, self._trees = ocp.DefaultCheckpointHandlerRegistry(), PacedTrees()
        registry.add(None, ocp.args.PyTreeSave, self._trees)
        self._manager = _Manager(self.folder, options=options, handler_registry=registry)
        if write:
            self._delete_outdated()
        self._kept: dict[str, Tree] | None = None  # the last copies, on CPUs
        self._keeping: threading.Thread | None = None
        self._thread, self._saving = ThreadPoolExecutor(1), Future()
        self._saving.set_result(None)

    def save(
        self, step: int, trees: dict[str, Tree], record: Callable[[], dict | None], *, copy_to: str | None = None
    ) -> None:
        """Write the checkpoint of `step`; return when it is on disk.

        copy_to: "device" or "pinned_host" (JAX's names of memory). Then return as soon as the devices have been told to
        copy the arrays, which lie on a mesh and may then change, into that memory, and write the copies; it waits for
        the checkpoint before, and for nothing else. On CPUs, which train meanwhile, the thread rests most of the time,
        until somebody waits for it.

        record: asked for it when the arrays are there, by the thread; if it is None, nothing is written.
        """
        self.wait()
        written, sums = self._taken(trees, copy_to)
        self._keep()
        self._saving = self._thread.submit(self._save, step, written, sums, record)
        if copy_to is None:
            self.wait()

    def prepare(self, trees: dict[str, Tree], copy_to: str | None) -> None:
        """Do what a run's first save would take longer for: compile its programs, and on CPUs find memory for copies.

        There that memory is kept from save to save. Between them a training step would be given parts of it, and then
        have to find as much again, which takes the operating system longer than the step.
        """
        self._taken(trees, copy_to)
        if self._kept:
            self._taken(trees, copy_to)  # into it, as from then on
        self._keep()

    def _taken(
        self, trees: dict[str, Tree], copy_to: str | None
    ) -> tuple[dict[str, Tree], dict[str, jax.Array] | None]:
        """What a checkpoint is to hold of these trees, and the checksum of each; None if the thread takes them."""
        copies = trees if copy_to is None else copied(trees, copy_to, self._kept)
        self._kept = copies if copy_to and jax.default_backend() == "cpu" else None
        if checksums.in_memory(trees):
            return copies, None
        on_devices = trees if copy_to == "pinned_host" else copies  # what they can take the sums of
        return copies, {name: checksums.by_devices(tree) for name, tree in on_devices.items()}

    def _keep(self) -> None:
        """If copies are kept: the pace of their writing, and the thread that keeps them, until somebody waits."""
        self._trees.pace = pace = Pace() if self._kept else None
        if pace:
            self._keeping = threading.Thread(target=_keep_in_memory, args=(self._kept, pace.hurry), daemon=True)
            self._keeping.start()

    def _save(
        self, step: int, trees: dict[str, Tree], sums: dict[str, jax.Array] | None, record: Callable[[], dict | None]
    ) -> None:
        pace = self._trees.pace
        rest = pace and pace.rest
        if pace:
            pace.pause()
        recorded = record()
        if recorded is None:
            return
        sums = sums or {name: checksums.by_this_thread(tree, rest) for name, tree in trees.items()}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        sums = {name: int(value) for name, value in sums.items()}
        items["record"] = ocp.args.JsonSave({"checksums": sums} | recorded)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            self._delete_outdated(rest)
        except Exception as error:
            raise InputError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}; the same "
                "command goes on from the one before"
            ) from error

    def _delete_outdated(self, rest: Callable[[int], None] | None = None) -> None:
        """Delete what Orbax only sets aside: at once, a checkpoint of 2 GB takes more than 0.1 s of a processor.

        rest: told the bytes of each file when it has been deleted.
        """
        if not processes.is_first():
            return
        for file in [path for path in (self.folder / OUTDATED).rglob("*") if path.is_file()]:
            size = file.stat().st_size
            file.unlink()
            if rest:
                rest(size)
        shutil.rmtree(self.folder / OUTDATED, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore_newest(self, abstract: Callable[[dict], dict[str, Tree]]) -> Restored | None:
        """The newest checkpoint that can be read, or None if there is none at all.

        `abstract(record)` says which trees to read, as shapes, dtypes and shardings; it may raise InputError to refuse.
        A checkpoint that cannot be read is passed over with a line on stderr. Raises InputError if all are so.
        """
        if sys.unraisablehook is not _unheard_abandoned_reads:
            _hooks.append(sys.unraisablehook)
            sys.unraisablehook = _unheard_abandoned_reads
        for step in self.steps():
            restored, reason = None, ""
            try:
                restored = self._read(step, abstract)
            except InputError:
                raise
            except Exception as error:  # Orbax and TensorStore share no base class for damage
                reason = _reason(error)
            reasons = list(filter(None, processes.gather(reason)))  # what one cannot read, none of them takes
            if not reasons:
                sums = restored.record["checksums"]
                reasons = [
                    f"the checksum of {name} is wrong"
                    for name, tree in restored.trees.items()
                    if checksums.checksum(tree) != sums[name]
                ]
            if not reasons:
                return restored
            path = self.folder / str(step)
            processes.say(f"warning: {path} cannot be read ({reasons[0]}); trying the one before", file=sys.stderr)
        if self.steps():
            raise InputError(f"not one of the checkpoints {self.steps()} in {self.folder} can be read")
        return None

    def _read(self, step: int, abstract: Callable[[dict], dict[str, Tree]]) -> Restored:
        """Each process for itself: one that finds damage where others find none leaves nobody waiting."""
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        folder = self.folder / str(step)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=alone) as reader:
            record = reader.restore(folder / "record")
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone) as reader:
            wanted = abstract(record).items()
            trees = {name: reader.restore(folder / name, args=ocp.args.StandardRestore(tree)) for name, tree in wanted}
        return Restored(step, record, trees)

    def set_aside(self, step: int, folder: Path) -> None:
        """Move a checkpoint that cannot be read out of the way, into `folder`."""
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / str(step)
            shutil.rmtree(target, ignore_errors=True)
            (self.folder / str(step)).rename(target)
        processes.wait_for_all(f"set aside {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Block until the last save is on disk. Raises InputError if it could not be written."""
        if self._trees.pace:
            self._trees.pace.hurry.set()
            self._keeping.join()
        self._saving.result()

    def close(self) -> None:
        """Block as `wait` does, and let go of the folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for asking JAX whether to stop: training does, and by now it is steps ahead."""

    def reached_preemption(self, step: int) -> bool:
        return False


def read_newest(workdir: Path, abstract: Callable[[dict], dict[str, Tree]]) -> Restored:
    """The newest readable checkpoint of a run, see `restore_newest`. Raises InputError if there is none."""
    store = CheckpointStore(workdir / "checkpoints", write=False)
    try:
        restored = store.restore_newest(abstract)
    finally:
        store.close()
    if restored is None:
        raise InputError(f"{workdir} has no checkpoint yet: let the run reach its first one")
    return restored


def _reason(error: Exception) -> str:
    """The operating system's own words, if there are any, or the first line of the error."""
    if found := re.search(r": ([^:]+) \[os_error_code=", str(error)):
        return found[1]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


# When a write fails, Orbax and asyncio log it for every array, each with a traceback. `wait` raises it, once.
for _logger, _words in {"absl": "_SignalingThread.run() raised", "asyncio": "exception was never retrieved"}.items():
    logging.getLogger(_logger).addFilter(lambda record, words=_words: words not in record.getMessage())

_hooks = []


def _unheard_abandoned_reads(raised) -> None:
    """When one array cannot be read, TensorStore's other reads end in the event loop that Orbax has closed by then, and
    each would print a traceback over the one line that says what is wrong."""
    if str(raised.exc_value) != "Event loop is closed":
        _hooks[-1](raised)


def _keep_in_memory(copies: dict[str, Tree], until: threading.Event) -> None:
    """Read a byte of each page again and again: memory that a program leaves idle, operating systems take from it.

    Those of virtual machines, too: a copy into memory that was idle for two minutes took 20 times as long on one.
    """
    shards = [shard.data for leaf in jax.tree.leaves(copies) for shard in leaf.addressable_shards]
    while not until.wait(IDLE):
        for shard in shards:
            _read_each_page(shard)


def _read_each_page(array: jax.Array) -> int:
    return np.asarray(array).reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max()


def copied(tree: Tree, memory: str, into: Tree | None = None) -> Tree:
    """The same arrays in that memory, shared out among the devices: what several of them hold is copied once.

    into: such copies of before, which are overwritten.
    """
    targets = jax.tree.map(lambda sharding: sharding.with_memory_kind(memory), shares(tree))
    if into is None:
        return jax.jit(_copy, out_shardings=targets)(tree)
    return jax.jit(_copy_into, out_shardings=targets, donate_argnums=0)(into, tree, np.True_)


def _copy(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)


def _copy_into(into: Tree, tree: Tree, true: jax.Array) -> Tree:
    """XLA copies twice if told no more than to copy, and takes new memory for that."""
    return jax.lax.cond(true, lambda old, new: new, lambda old, new: old, into, tree)
