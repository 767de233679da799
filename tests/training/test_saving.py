"""What is written of a state must stay as it was."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.checkpoints import store as store_module
from dit_jax.checkpoints.store import CheckpointStore, copied
from dit_jax.parallel.mesh import make_mesh


def state() -> dict:
    mesh = make_mesh({"data": 2, "fsdp": 4})
    numbers = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
    return {
        "split": jax.device_put(numbers, NamedSharding(mesh, P("fsdp"))),
        "whole": jax.device_put(numbers[0], NamedSharding(mesh, P())),
    }


@pytest.fixture
def step():
    return jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.sin(leaf) + 1, tree), donate_argnums=0)


@pytest.mark.parametrize("copy_to", ["device", "pinned_host", None])
def test_a_save_holds_the_state_as_it_was_while_steps_change_it(tmp_path, step, copy_to):
    tree = state()
    before = jax.tree.map(np.asarray, tree)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": tree}, lambda: {"interval": {"count": 3}}, copy_to=copy_to)
    for _ in range(5):
        tree = step(tree)
    store.wait()
    restored = store.restore_newest(lambda record: {"model": shapes})
    store.close()
    assert all(map(np.array_equal, *map(jax.tree.leaves, (restored.trees["model"], before))))
    assert restored.record["interval"] == {"count": 3}


def test_training_goes_on_before_the_record_of_a_save_is_known(tmp_path):
    known = threading.Event()

    def record() -> dict:
        assert known.wait(60)
        return {"interval": {"count": 3}}

    store = CheckpointStore(tmp_path)
    store.save(1, {"model": state()}, record, copy_to="device")
    known.set()
    store.close()
    assert store.steps() == [1]


def test_a_save_without_a_record_is_none(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": state()}, lambda: None, copy_to="device")
    store.close()
    assert store.steps() == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_a_copy_lies_where_it_is_asked_to_and_once(kind):
    for leaf, copy in zip(*map(jax.tree.leaves, (state(), copied(state(), kind))), strict=True):
        assert np.array_equal(leaf, copy) and copy.sharding.memory_kind == kind
        assert sum(shard.data.size for shard in copy.addressable_shards) == leaf.size


def test_a_copy_takes_the_place_of_the_one_before():
    first, second = state(), jax.tree.map(lambda leaf: leaf + 1, state())
    copy = copied(first, "device")
    places = pointers(copy)
    again = copied(second, "device", into=copy)
    assert all(map(np.array_equal, again.values(), second.values()))
    assert pointers(again) == places and copy["split"].is_deleted()


def test_saves_of_a_run_on_cpus_are_copied_into_the_same_memory(tmp_path):
    states = [jax.tree.map(lambda leaf, i=i: leaf + i, state()) for i in range(3)]
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), states[0])
    store = CheckpointStore(tmp_path)
    store.prepare({"model": states[0]}, "device")
    places = pointers(store._kept["model"])
    for i, tree in enumerate(states):
        store.save(i, {"model": tree}, dict, copy_to="device")
        assert pointers(store._kept["model"]) == places
    store.wait()
    for i in reversed(range(3)):
        restored = store.restore_newest(lambda record: {"model": shapes})
        assert restored.step == i and all(map(np.array_equal, restored.trees["model"].values(), states[i].values()))
        store.set_aside(i, tmp_path / "aside")
    store.close()


def test_memory_for_copies_is_read_while_it_is_idle_and_left_alone_by_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "IDLE", 0.001)
    reads = threading.Semaphore(0)

    def read(array: jax.Array, really=store_module._read_each_page) -> int:
        reads.release()
        return really(array)

    def copied_alone(*args, really=store_module.copied):
        assert not store._keeping or not store._keeping.is_alive()
        return really(*args)

    monkeypatch.setattr(store_module, "_read_each_page", read)
    monkeypatch.setattr(store_module, "copied", copied_alone)
    store, tree = CheckpointStore(tmp_path), state()
    store.prepare({"model": tree}, "device")
    places = pointers(store._kept["model"])
    for step in range(3):
        for _ in range(2 * 8 * len(tree)):
            assert reads.acquire(timeout=60)
        store.save(step, {"model": tree}, dict, copy_to="device")
        assert pointers(store._kept["model"]) == places
    store.close()
    assert not store._keeping.is_alive() and store.steps() == [2, 1, 0]


def pointers(tree: dict) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in tree.values() for shard in leaf.addressable_shards]
