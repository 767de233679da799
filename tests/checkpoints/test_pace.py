"""A save beside training: part after part with rests between, and no rests once somebody waits for it."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.checkpoints import pace
from dit_jax.checkpoints.store import OUTDATED, CheckpointStore
from dit_jax.parallel.mesh import make_mesh

BYTES = 5 * 5 * 4  # of each array


class Writes(NamedTuple):
    """When each part of an array was to be written, when that began and ended, its bytes, and whether one has ended."""

    asked: list[float]
    began: list[float]
    ended: list[float]
    sizes: list[int]
    one_is_written: threading.Event


@pytest.fixture
def writes(monkeypatch) -> Writes:
    writes = Writes([], [], [], [], threading.Event())
    monkeypatch.setattr(pace, "PAUSE", 0.1)

    class Watched(pace.Pace):
        async def wait_for_bytes(self, requested_bytes: int) -> None:
            writes.asked.append(time.monotonic())
            await super().wait_for_bytes(requested_bytes)
            writes.began.append(time.monotonic())
            writes.sizes.append(requested_bytes)

        async def release_bytes(self, requested_bytes: int) -> None:
            writes.ended.append(time.monotonic())
            await super().release_bytes(requested_bytes)
            writes.one_is_written.set()

    monkeypatch.setattr("dit_jax.checkpoints.store.Pace", Watched)
    return writes


def tree() -> dict:
    everywhere = NamedSharding(make_mesh({"data": 8}), P())
    return {str(i): jax.device_put(np.full((5, 5), i, np.float32), everywhere) for i in range(4)}


def test_arrays_are_written_in_turn_with_rests_between(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(pace, "WRITTEN", 1000)
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": tree()}, dict, copy_to="device")
    store._saving.result()  # `wait` would hurry it
    store.close()
    assert len(writes.began) == len(writes.ended) == 4
    for i in range(3):
        assert writes.asked[i + 1] >= writes.ended[i]  # Orbax begins an array when the one before is written
        assert writes.began[i + 1] - writes.ended[i] >= 0.99 * BYTES / pace.WRITTEN


def test_large_arrays_are_written_in_parts_and_read_whole(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(pace, "PART", 50)
    mesh = make_mesh({"data": 4, "tensor": 2})
    layouts = {"large": ((24, 20), P("data", "tensor")), "odd": ((7, 5), P()), "number": ((), P())}
    given = {
        name: jax.device_put(np.random.default_rng(0).random(shape, np.float32), NamedSharding(mesh, spec))
        for name, (shape, spec) in layouts.items()
    }
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": given}, dict, copy_to="device")
    store.wait()
    # Six rows of ten on each device are three parts; a seventh of the odd ones would be too small.
    assert sorted(writes.sizes) == [4] + 24 * [2 * 10 * 4] + [7 * 5 * 4]
    restored = store.restore_newest(lambda record: {"model": jax.eval_shape(lambda tree: tree, given)})
    store.close()
    assert all(np.array_equal(restored.trees["model"][name], value) for name, value in given.items())


def test_who_waits_for_a_save_hurries_it(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(pace, "WRITTEN", 0.1)
    store, given = CheckpointStore(tmp_path), tree()
    store.save(1, {"model": given}, dict, copy_to="device")
    assert writes.one_is_written.wait(60)
    asked = time.monotonic()
    store.wait()
    assert time.monotonic() - asked < BYTES / pace.WRITTEN
    shapes = jax.eval_shape(lambda tree: tree, given)
    restored = store.restore_newest(lambda record: {"model": shapes})
    store.close()
    assert all(np.array_equal(a, b) for a, b in zip(restored.trees["model"].values(), given.values(), strict=True))


def test_trees_are_begun_and_ended_with_rests_between(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "PAUSE", 0)
    monkeypatch.setattr(pace, "ASK_AGAIN", 0.001)
    begun, ended = [], []

    def timed(really: Callable, times: list[float]) -> Callable:
        return lambda *args, **options: times.append(time.monotonic()) or really(*args, **options)

    orbax = ocp.PyTreeCheckpointHandler
    monkeypatch.setattr(orbax, "async_save", timed(orbax.async_save, begun))
    monkeypatch.setattr(orbax, "finalize", timed(orbax.finalize, ended))
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": tree(), "ema": tree(), "opt": tree()}, dict, copy_to="device")
    store._saving.result()
    store.close()
    for one, two, three in (begun, ended):
        assert min(two - one, three - two) >= 0.99 * pace.BETWEEN


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_what_was_written(tmp_path):
    store, given = CheckpointStore(tmp_path), tree()
    store.save(1, {"model": given}, lambda: {"name": "a run's"}, copy_to="device")
    store.close()
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(1)
    assert restored.record["name"] == "a run's"
    assert all(map(np.array_equal, restored.model.values(), given.values()))


def test_the_step_after_the_copy_is_let_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "PAUSE", 100)
    store, started = CheckpointStore(tmp_path), time.monotonic()
    store.save(1, {"model": tree()}, dict, copy_to="device")
    assert list(tmp_path.iterdir()) == [] and not store._saving.done()
    store.wait()
    assert store.steps() == [1] and time.monotonic() - started < pace.PAUSE
    store.close()


def test_checksums_are_taken_with_rests_between(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "PAUSE", 0)
    monkeypatch.setattr(pace, "READ", 1000)
    store, started = CheckpointStore(tmp_path), time.monotonic()
    store.save(1, {"model": tree()}, dict, copy_to="device")
    store._saving.result()
    assert time.monotonic() - started >= 0.99 * 4 * BYTES / pace.READ
    store.close()


def test_what_is_not_kept_is_deleted_with_rests_between(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "PAUSE", 0)
    rests = []
    monkeypatch.setattr(pace.Pace, "rest", lambda self, size: rests.append(size))
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"model": tree()}, dict)
    sizes = [path.stat().st_size for path in (tmp_path / "1").rglob("*") if path.is_file()]
    store.save(2, {"model": tree()}, dict, copy_to="device")
    store._saving.result()
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert sorted(rests) == sorted(4 * [BYTES] + sizes)  # the arrays summed up, and the files


def test_what_a_kill_left_to_be_deleted_goes_at_the_next_start(tmp_path):
    (tmp_path / OUTDATED / "1").mkdir(parents=True)
    (tmp_path / OUTDATED / "1" / "file").touch()
    reader = CheckpointStore(tmp_path, write=False)
    assert reader.steps() == [] and (tmp_path / OUTDATED / "1" / "file").exists()
    reader.close()
    CheckpointStore(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_held_back_where_nobody_trains_meanwhile(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(pace, "PAUSE", 100)
    monkeypatch.setattr(pace, "WRITTEN", 0.1)
    store, started = CheckpointStore(tmp_path), time.monotonic()
    store.save(1, {"model": tree()}, dict)
    assert time.monotonic() - started < pace.PAUSE
    store.close()
    assert writes.ended == [] and store.steps() == [1]
