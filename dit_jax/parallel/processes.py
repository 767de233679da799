"""Several processes as one program: how they find each other, who talks, how they stop and how they end together."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count as counter
from typing import Any

from absl import flags, logging

from dit_jax.errors import InputError
from dit_jax.parallel.watch import Watch, one_line

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With several processes: host:port of the first. Slurm, MPI and TPU pods are found without."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this is, from 0.", lower_bound=0)

A_WEEK = 7 * 24 * 3600  # seconds
TO_COME = 300  # seconds that processes wait for each other at the start

_rounds = counter()


@contextmanager
def together(saves_when_stopped: bool = False) -> Iterator[None]:
    """Around a command's body: join the other processes, if there are any, and leave when all have come to the end.

    To be entered before anything touches a device. If the body raises in one process of several, or one is lost, none
    of them waits for it: each says what happened and exits with a status that is not 0, see `Watch`. Raises InputError
    if the others cannot be joined.

    saves_when_stopped: whether the body asks `stop_signals`; otherwise SIGTERM just ends the process.
    """
    how = find_others()
    if how is None:
        yield
        return
    import jax
    from jax._src.distributed import global_state

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", saves_when_stopped)
    try:
        jax.distributed.initialize(**how, initialization_timeout=TO_COME)
    except RuntimeError as error:
        raise InputError(f"the processes did not find each other: {one_line(error)}") from error
    if global_state.process_id:
        logging.set_verbosity(logging.ERROR)  # Orbax warns in each process of what the first one says too
    again = "goes on from the last checkpoint" if saves_when_stopped else "has to be started again in all processes"
    watch = Watch(
        global_state.client,
        global_state.coordinator_address,
        global_state.process_id,
        global_state.num_processes,
        f"the same command {again}",
    )
    try:
        yield
        wait_for_all("the end")
    except BaseException as error:
        watch.end(error)
    watch.stop()
    jax.distributed.shutdown()


def require_alone() -> None:
    """Raise InputError in one of several processes, for a command that takes one: on a TPU pod, the devices of one
    host would wait for those of the others."""
    if find_others() is not None:
        raise InputError(
            "this is one of several processes, and the command computes in one: start it outside of srun or mpirun, "
            "on one host of a TPU pod with JAX_PLATFORMS=cpu"
        )


def is_first() -> bool:
    """Whether this process is the one that talks and writes what there is one of."""
    import jax

    return jax.process_index() == 0


def alone() -> bool:
    """Whether this process is the only one."""
    import jax

    return jax.process_count() == 1


def say(line: str, file=None) -> None:
    """Print a line in the first process, to stdout or to `file`."""
    if is_first():
        print(line, file=file, flush=True)


def wait_for_all(name: str) -> None:
    """Return when every process has come here, however long after the first; each name is used once."""
    import jax
    from orbax.checkpoint import multihost

    # A collective of the devices, which is what JAX and Orbax wait with otherwise, gives up after 30 s on a CPU.
    multihost.sync_global_processes(name, timeout=A_WEEK, processes=set(range(jax.process_count())))


def gather(value: str) -> list[str]:
    """The value that each process gives, in their order; returns when all have, and all come here equally often."""
    import jax
    from jax._src.distributed import global_state

    if alone():
        return [value]
    folder = f"gather/{next(_rounds)}"
    global_state.client.key_value_set(f"{folder}/{jax.process_index()}", value)
    wait_for_all(folder)
    return [global_state.client.key_value_try_get(f"{folder}/{i}") for i in range(jax.process_count())]


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """A function (step) that tells whether SIGTERM or Ctrl-C has come to any process, at the same step in all of them.

    It is to be asked after every step. With one process, a second signal acts as if this were not here.
    """
    if not alone():
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        # JAX itself listens to SIGTERM, and agrees with the others on a step that none has passed.
        with _handling([signal.SIGINT], lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
            yield reached_preemption_sync_point
    else:
        received = []
        with _handling([signal.SIGTERM, signal.SIGINT], lambda number, _: received.append(number)):
            yield lambda step: bool(received)


@contextmanager
def _handling(numbers: list[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handler` have the first of these signals that comes."""

    def once(number: int, frame: Any) -> None:
        restore()
        handler(number, frame)

    def restore() -> None:
        for number, former in before.items():
            signal.signal(number, former)

    before = {number: signal.signal(number, once) for number in numbers}
    try:
        yield
    finally:
        restore()


def find_others() -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs to know here; None where this process is the only one."""
    environment = os.environ
    given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if any(value is not None for value in given):
        return _given(*given)
    if "SLURM_STEP_NODELIST" in environment and _slurm_tasks() > 1:
        here = _tasks_on_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environment.get("SLURM_NODEID", 0)))
        gpus = _own_gpus(here, int(environment["SLURM_LOCALID"]))
        return {"cluster_detection_method": "slurm", "local_device_ids": gpus}
    if (size := int(environment.get("OMPI_COMM_WORLD_SIZE") or environment.get("PMI_SIZE") or 1)) > 1:
        here = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get("MPI_LOCALNRANKS") or 0)
        gpus = _own_gpus(here, int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK") or 0))
        method = "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
        if method == "mpi4py" and find_spec("mpi4py") is None:
            raise InputError(
                f"MPI has started {size} processes, which find each other with mpi4py, and that is not installed: "
                "pip install mpi4py, or give --coordinator, --num_processes and --process_id"
            )
        return {"cluster_detection_method": method, "local_device_ids": gpus}
    pod = _tpu_pod()
    return pod and {"cluster_detection_method": pod}


def _given(coordinator: str | None, count: int | None, index: int | None) -> dict[str, Any]:
    if None in (coordinator, count, index) or index >= count:
        raise InputError(
            f"coordinator={coordinator}, num_processes={count}, process_id={index}: expected all three, as "
            "--coordinator=host:1234 --num_processes=2 --process_id=0, the last below the second"
        )
    # Otherwise JAX would still look around for what it was not told: the devices.
    return {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _slurm_tasks() -> int:
    """Tasks of this step; a step of one, such as the shell of `salloc`, may have the job's SLURM_NTASKS as well."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def _tasks_on_node(counts: str, node: int) -> int:
    """Slurm's `2(x3),1` is 2, 2, 2 and 1 tasks on the nodes; 0 if it does not say."""
    tasks = []
    for part in filter(None, counts.split(",")):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    return tasks[node] if node < len(tasks) else 0


def _own_gpus(processes: int, index: int) -> list[int] | None:
    """Which of the GPUs that process `index` of so many on this node sees are its own: [] all, None as JAX chooses.

    JAX gives each process the GPU of its index: wrong for one process a node, and where each sees its own only.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    seen = len(visible.split(",")) if visible else 0
    if processes == 1 or 0 < seen < max(processes, int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)):
        return []
    if processes and seen >= processes and seen % processes == 0:
        share = seen // processes
        return list(range(index * share, (index + 1) * share))
    return None


def _tpu_pod() -> str | None:
    """The environment of a pod that JAX finds here; without TPUs, nothing is asked of the network."""
    if "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
        return None
    import jax  # noqa: F401  which looks for TPUs when it is imported
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    if not running_in_cloud_tpu_vm:
        return None
    return next((pod.name for pod in (GkeTpuCluster, GceTpuCluster) if pod.is_env_present()), None)
