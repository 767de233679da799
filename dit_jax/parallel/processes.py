"""Several processes as one program."""

import jax
from orbax.checkpoint import multihost

from dit_jax.errors import InputError

A_WEEK = 7 * 24 * 3600  # seconds


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Join the other processes, before anything touches a device; without a coordinator this is the only one.

    coordinator: host:port of process 0. Raises InputError if not all three are given, or none.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if not any(given):
        return
    if not all(given) or not 0 <= index < count:
        raise InputError(
            f"coordinator={coordinator}, num_processes={count}, process_id={index}: expected all three, as "
            "--coordinator=host:1234 --num_processes=2 --process_id=0, the last below the second"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, count, index)


def wait_for_all(name: str) -> None:
    """Return when every process has come here, however long after the first; each name is used once."""
    # A collective of the devices, which is what JAX and Orbax wait with otherwise, gives up after 30 s on a CPU.
    multihost.sync_global_processes(name, timeout=A_WEEK, processes=set(range(jax.process_count())))
