"""What the store computes of a state that is spread over devices."""

import resource

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.checkpoints import checksums
from dit_jax.checkpoints.store import CheckpointStore
from dit_jax.errors import InputError
from dit_jax.parallel.mesh import make_mesh


def spread(tree: dict) -> dict:
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    specs = {"a": P(None, "fsdp", "tensor"), "b": P("tensor", "fsdp"), "c": P()}
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}


def numbers() -> dict:
    random = np.random.default_rng(0)
    shapes = {"a": (3, 8, 4), "b": (6, 10), "c": ()}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_checksum_of_a_state_does_not_depend_on_who_takes_it_and_gathers_nothing(monkeypatch):
    tree = numbers()
    expected = checksums.by_this_thread(tree)
    assert int(checksums.by_devices(spread(tree))) == int(checksums.by_devices(tree)) == expected
    assert checksums.by_this_thread(spread(tree)) == checksums.checksum(spread(tree)) == expected
    monkeypatch.setattr(checksums, "CHUNK", 7)
    assert checksums.by_this_thread(tree) == expected
    program = checksums.by_devices.lower(spread(tree)).compile().as_text()
    assert "all-reduce" in program
    assert not [name for name in ("all-gather", "all-to-all", "collective-permute") if name in program]


def test_every_bit_counts_and_every_place():
    tree = numbers()
    changed = tree | {"b": tree["b"].copy()}
    changed["b"].view(np.uint32)[5, 9] ^= 1
    swapped = tree | {"a": np.ascontiguousarray(tree["a"][:, ::-1])}
    assert len({checksums.checksum(each) for each in (tree, changed, swapped)}) == 3


def test_the_checksum_is_what_older_checkpoints_hold():
    total = 0
    for i, leaf in enumerate(jax.tree.leaves(numbers())):
        bits = np.atleast_1d(leaf).view(np.uint32).ravel().astype(object)
        total = (total * 31 + sum(bits * (2 * np.arange(len(bits)).astype(object) + 1)) + i) % 2**32
    assert checksums.checksum(numbers()) == total


def test_a_checkpoint_that_cannot_be_written_is_told_in_a_line_and_leaves_nothing(tmp_path, capfd):
    tree = {"a": jax.device_put(jax.numpy.arange(2.0**18), NamedSharding(make_mesh({"data": 8}), P()))}
    store = CheckpointStore(tmp_path)
    store.save(6, {"model": tree}, dict, copy_to="device")  # its programs are compiled here, where they may be cached
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        store.save(7, {"model": tree}, dict, copy_to="device")
        with pytest.raises(InputError, match=r"step 7 could not be written to .*: File too large; the same command"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(InputError, match="step 7"):
        store.close()
    again = CheckpointStore(tmp_path)
    assert again.steps() == [6]
    again.save(7, {"model": tree}, dict)
    assert again.steps() == [7, 6]
    again.close()
