"""A save beside training: one array after the other with rests between, and no rests once somebody waits for it."""

import itertools
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.checkpoints import pace
from dit_jax.checkpoints.store import CheckpointStore
from dit_jax.parallel.mesh import make_mesh

ARRAYS = 4


@pytest.fixture
def writes(monkeypatch) -> list[tuple[float, float]]:
    """When each array's writing began, and when it ended."""
    began, ended = [], []

    class Watched(pace.Pace):
        async def wait_for_bytes(self, requested_bytes: int) -> None:
            await super().wait_for_bytes(requested_bytes)
            began.append(time.monotonic())

        async def release_bytes(self, requested_bytes: int) -> None:
            ended.append(time.monotonic())
            await super().release_bytes(requested_bytes)

    monkeypatch.setattr("dit_jax.checkpoints.store.Pace", Watched)
    return began, ended


def tree() -> dict:
    everywhere = NamedSharding(make_mesh({"data": 8}), P())
    return {str(i): jax.device_put(np.full((5, 5), i, np.float32), everywhere) for i in range(ARRAYS)}


def test_arrays_are_written_in_turn_with_rests_between(tmp_path, writes):
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": tree()}, {}, copy_to="device")
    store._saving.result()  # `wait` would hurry it
    began, ended = writes
    assert len(began) == len(ended) == ARRAYS
    for (start, end), after in zip(zip(began, ended, strict=True), began[1:], strict=False):
        assert after - end >= 0.9 * pace.REST * (end - start)
    store.close()


def test_who_waits_for_a_save_hurries_it(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(pace, "REST", 1_000_000)
    store, given = CheckpointStore(tmp_path), tree()
    store.save(1, {"model": given}, {}, copy_to="device")
    began, ended = writes
    while not ended:
        time.sleep(0.01)
    rest = pace.REST * (ended[0] - began[0])
    asked = time.monotonic()
    store.wait()
    assert time.monotonic() - asked < rest
    shapes = jax.eval_shape(lambda tree: tree, given)
    restored = store.restore_newest(lambda record: {"model": shapes})
    assert all(np.array_equal(a, b) for a, b in zip(restored.trees["model"].values(), given.values(), strict=True))
    store.close()


def test_nothing_is_held_back_when_the_save_is_waited_for_at_once(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(pace, "REST", 1_000_000)
    store = CheckpointStore(tmp_path)
    started = time.monotonic()
    store.save(1, {"model": tree()}, {})
    began, ended = writes
    assert store.steps() == [1]
    assert time.monotonic() - started < pace.REST * min(e - b for b, e in itertools.zip_longest(began, ended))
    store.close()
