"""What a program leaves of a device's memory, and where the copy of a state finds room beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.parallel import memory
from dit_jax.parallel.mesh import make_mesh

PART = (64 * 48 * 4 + 48 * 4) // 8  # of the state, for each device: what several hold is copied once


@pytest.mark.parametrize(("platform", "otherwise"), [("gpu", "pinned_host"), ("cpu", None)])
def test_the_copy_goes_where_the_step_leaves_room(monkeypatch, platform, otherwise):
    mesh, numbers = make_mesh({"data": 2, "fsdp": 4}), np.ones((64, 48), np.float32)
    tree = {
        "split": jax.device_put(numbers, NamedSharding(mesh, P("fsdp"))),
        "whole": jax.device_put(numbers[0], NamedSharding(mesh, P())),
    }
    step = jax.jit(lambda tree: jax.tree.map(jnp.sin, tree))
    monkeypatch.setattr(memory, "live_bytes", lambda program: 5 * PART)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for limit, place in ((6 * PART / 0.9 + 1, "device"), (6 * PART / 0.9 - 1, otherwise)):
        monkeypatch.setattr(memory, "device_bytes", lambda limit=limit: limit)
        assert memory.memory_for_copy(tree, step, tree) == place
    monkeypatch.setattr(memory, "device_bytes", lambda: 1e9)
    monkeypatch.setattr(memory.processes, "gather", lambda value: [value, "no"])  # another process has none
    assert memory.memory_for_copy(tree, step, tree) == otherwise


def test_what_lives_is_arguments_and_outputs_that_are_not_made_in_their_place():
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    add = lambda a, b: a + b  # noqa: E731
    live = {
        donated: memory.live_bytes(jax.jit(add, donate_argnums=donated).lower(x, x).compile()) for donated in ((), 0)
    }
    assert live == {(): 3 * 4096, 0: 2 * 4096}


class Device:
    platform = "gpu"

    def memory_stats(self) -> dict:
        return {"bytes_limit": 1000}


def test_the_memory_of_a_device_is_what_it_says_and_a_cpu_has_its_share_of_the_machines(monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    assert memory.device_bytes() == 4096 * 1000 / 8
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert memory.device_bytes() == 1000
