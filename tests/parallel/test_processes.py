"""Where the other processes are: what launchers leave in the environment, and what of it JAX is told."""

import signal
import subprocess
import sys

import pytest
from absl import flags

from dit_jax.errors import InputError
from dit_jax.parallel import processes
from dit_jax.parallel.watch import _is_jax_error

LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "MPI_", "CUDA_VISIBLE_DEVICES", "TPU_", "JAX_PLATFORMS")


@pytest.fixture
def found(monkeypatch):
    """A function: the flags and the environment given -> what JAX is told."""

    def find(*arguments: str, **environment: str):
        flags.FLAGS(["command", *arguments])
        for name in [name for name in processes.os.environ if name.startswith(LAUNCHERS)]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return processes.find_others()

    yield find
    flags.FLAGS.unparse_flags()
    for name in ("coordinator", "num_processes", "process_id"):
        flags.FLAGS[name].unparse()


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def test_alone_nothing_is_joined(found):
    assert found() is None


def test_a_command_for_one_process_is_refused_in_one_of_several(found):
    found()
    processes.require_alone()
    found(**SLURM)
    with pytest.raises(InputError, match="one of several processes"):
        processes.require_alone()


def test_flags_come_before_any_environment(found):
    given = found("--coordinator=a:1", "--num_processes=2", "--process_id=0", **SLURM)
    assert given == {
        "coordinator_address": "a:1",
        "num_processes": 2,
        "process_id": 0,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--coordinator=a:1"],
        ["--num_processes=2", "--process_id=0"],
        ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
    ],
)
def test_flags_are_given_all_three_or_none(found, arguments):
    with pytest.raises(InputError, match="expected all three"):
        found(*arguments)


def test_tasks_of_a_slurm_step_find_each_other(found):
    assert found(**SLURM) == {"cluster_detection_method": "slurm", "local_device_ids": None}


def test_a_batch_script_or_a_step_of_one_task_is_alone(found):
    assert found(**SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # the shell that `salloc` opens
    script = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}
    assert found(**script) is None
    assert found(**SLURM | {"SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, []),  # alone on its node: all that are there
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),  # a GPU a task
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, [2, 3]),  # half of them
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "2"}, []),  # bound by Slurm: all that it sees
        ({"SLURM_STEP_TASKS_PER_NODE": ""}, None),
    ],
)
def test_a_slurm_task_uses_its_share_of_the_gpus_of_its_node(found, environment, own):
    assert found(**SLURM | environment)["local_device_ids"] == own


def test_an_mpi_process_uses_the_one_gpu_that_it_sees(found):
    launched = OMPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert found(**launched, CUDA_VISIBLE_DEVICES="1")["local_device_ids"] == []


def test_mpi_is_found_by_jax_or_by_mpi4py_which_must_be_there(found, monkeypatch):
    launched = OMPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
    assert found(**launched) == {"cluster_detection_method": "ompi", "local_device_ids": None}
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    for environment in (OMPI, {"PMI_SIZE": "2", "PMI_RANK": "0"}):
        with pytest.raises(InputError, match="pip install mpi4py"):
            found(**environment)
    monkeypatch.setattr(processes, "find_spec", lambda name: name)
    assert found(PMI_SIZE="2") == {"cluster_detection_method": "mpi4py", "local_device_ids": None}
    assert found(PMI_SIZE="1") is None


def test_nothing_is_asked_of_the_network_without_tpus(found, monkeypatch):
    from jax._src import cloud_tpu_init
    from jax._src.clusters import GceTpuCluster, cloud_tpu_cluster

    asked = []
    monkeypatch.setattr(GceTpuCluster, "is_env_present", lambda: asked.append(1) or True)
    assert found() is None and not asked
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    assert found(JAX_PLATFORMS="cpu") is None and not asked
    assert found() == {"cluster_detection_method": "gcetpu"} and asked
    assert found(TPU_WORKER_HOSTNAMES="a,b", TPU_WORKER_ID="0") == {"cluster_detection_method": "gketpu"}


def test_with_one_process_a_second_signal_acts_as_ever():
    handler = signal.getsignal(signal.SIGTERM)
    with processes.stop_signals() as stopping:
        assert not stopping(1)
        signal.raise_signal(signal.SIGTERM)
        assert stopping(2) and stopping(3)
        assert signal.getsignal(signal.SIGTERM) is handler
    assert processes.gather("a") == ["a"]


@pytest.mark.parametrize("command", ["train", "sample", "encode"])
def test_every_command_shows_the_flags(command):
    shown = subprocess.run([sys.executable, "-m", f"dit_jax.{command}", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--coordinator" in shown.stdout and "--process_id" in shown.stdout


def test_a_collective_that_fails_as_it_is_dispatched_is_an_error_of_the_runtime():
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer")
    try:
        raise RuntimeError("the checkpoint was not saved") from lost
    except RuntimeError as error:
        assert _is_jax_error(error)
    assert not _is_jax_error(ValueError("a folder is missing"))
