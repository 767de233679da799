"""launch/slurm.sbatch under a real Slurm: a cluster of one node, made for these tests in a temporary folder."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from dit_jax.parallel.watch import LOST

ROOT = Path(__file__).resolve().parents[2]
TRAINING = Path(__file__).parent / "standins" / "training.py"

SMALL = [
    "--config.steps=200",
    "--config.model.hidden_size=16",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
    "--config.model.unroll=1",
    "--config.batch_size=16",
    "--config.log_every=10",
    "--config.preview.every=0",
    "--config.checkpoint.every=50",
]
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# Jobs that were put back wait until their credentials have expired: 120 seconds, if nothing is said.
AuthInfo=socket={folder}/munge,cred_expire=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 Gres=gpu:2 State=UNKNOWN
PartitionName=usual Nodes=ALL State=UP Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


@pytest.fixture(scope="module", autouse=True)
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # not pytest's: the path of a socket has 108 characters at most
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, user=user, ports=free_ports(2)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        at = [f"--{name}={folder / file}" for name, file in MUNGE_FILES.items()]
        daemons = [start(folder, "munged", "--foreground", "--force", *at)]
        wait_until((folder / "munge").exists)
        daemons += [start(folder, "slurmctld", "-D", "-i"), start(folder, "slurmd", "-D")]
        try:
            wait_until(lambda: "idle" in ask("sinfo", "--noheader", "--format=%T"))
            yield
        except AssertionError:
            for log in folder.glob("*.log"):
                print(f"== {log.name}", *log.read_text().splitlines()[-20:], sep="\n")
            raise
        finally:
            ask("scancel", f"--user={user}")
            with suppress(AssertionError):
                wait_until(lambda: not ask("squeue", "--noheader", "--states=RUNNING,COMPLETING"))
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(timeout=20)
            shutil.rmtree(folder)


MUNGE_FILES = {
    "key-file": "key",
    "socket": "munge",
    "pid-file": "munged.pid",
    "log-file": "munge.log",
    "seed-file": "seed",
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


def start(folder: Path, *command: str) -> subprocess.Popen:
    with (folder / f"{command[0]}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def wait_until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)


class Job:
    """Two tasks of a command, through launch/slurm.sbatch."""

    def __init__(self, log: Path, *command: str, options: Sequence[str] = ()):
        self.log = log
        here = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
        submit = ["sbatch", "--parsable", *here, *options, "launch/slurm.sbatch", "--", *command]
        self.id = subprocess.run(submit, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    def said(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text()

    def facts(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "show", "job", self.id)))

    def task(self, index: int) -> int:
        """The process of task `index`."""
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                variables = set((process / "environ").read_text().split("\0"))
                program = Path((process / "cmdline").read_text().split("\0")[0]).name
                if program == "python" and {f"SLURM_JOB_ID={self.id}", f"SLURM_PROCID={index}"} <= variables:
                    return int(process.name)
        raise AssertionError(f"job {self.id} has no task {index}")

    def hurry(self) -> None:
        """Let it begin at once where it would wait for a while."""
        wait_until(lambda: self.facts()["JobState"] == "PENDING")
        ask("scontrol", "update", f"jobid={self.id}", "StartTime=now")

    def end(self, seconds: float = 30) -> tuple[str, str, str]:
        """State, exit status, how often it was put back."""
        wait_until(lambda: self.facts()["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
        facts = self.facts()
        return facts["JobState"], facts["ExitCode"].split(":")[0], facts["Restarts"]


def counting(folder: Path) -> list[str]:
    """The command of a stand-in for a training: a state of its own for each task, and no end by itself."""
    return ["bash", "-c", f"exec {sys.executable} {TRAINING} {folder}/state$SLURM_PROCID 1000000"]


@pytest.fixture(scope="module", autouse=True)
def killed_training(cluster, tmp_path_factory):
    """The job of a training with one task killed. The other takes 25 s to be sure of it; other tests run meanwhile."""
    folder = tmp_path_factory.mktemp("training")
    command = [sys.executable, "-m", "dit_jax.train", "--config=configs/digits.py", f"--workdir={folder}", *SMALL]
    job = Job(folder / "log", *command, options=["--partition=urgent"])
    wait_until((folder / "checkpoints" / "50").exists, seconds=240)
    os.kill(job.task(1), signal.SIGKILL)
    return job


def test_a_preempted_job_saves_and_is_put_back(tmp_path):
    # A slow scontrol, so that Slurm's SIGTERM to a job that is put back finds the script still running.
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\n{shutil.which("scontrol")} "$@"; sleep 1\n')
    (tmp_path / "scontrol").chmod(0o755)
    options = [gpus := "--gpus-per-node=2", f"--export=ALL,PATH={tmp_path}:{os.environ['PATH']}"]
    job = Job(tmp_path / "log", *counting(tmp_path), options=options)
    wait_until(lambda: job.said("0: from step 0") and job.said("1: from step 0"))
    urgent = ask("sbatch", "--parsable", "--partition=urgent", gpus, "--output=/dev/null", "--wrap=true")
    wait_until(lambda: job.facts()["JobState"] == "PENDING")
    wait_until(lambda: "COMPLETED" in ask("scontrol", "show", "job", urgent))
    assert job.said("back into the queue") and not job.said("SIGTERM: saving")
    assert job.facts()["Restarts"] == "1"
    assert all(int((tmp_path / f"state{task}").read_text()) > 0 for task in range(2))


def test_before_its_time_limit_a_job_saves_and_is_put_back(tmp_path):
    job = Job(tmp_path / "log", *counting(tmp_path))
    wait_until(lambda: job.said("0: from step 0") and job.said("1: from step 0"))
    ask("scancel", "--batch", "--signal=TERM", job.id)  # what --signal=B:SIGTERM@120 does then
    wait_until(lambda: job.facts()["JobState"] == "PENDING")
    assert job.said("back into the queue") and job.facts()["Restarts"] == "1"
    assert all(int((tmp_path / f"state{task}").read_text()) > 0 for task in range(2))


def test_a_cancelled_job_saves_and_stays_cancelled(tmp_path):
    job = Job(tmp_path / "log", *counting(tmp_path))
    wait_until(lambda: job.said("0: from step 0") and job.said("1: from step 0"))
    ask("scancel", job.id)
    assert job.end()[0] == "CANCELLED"
    assert all(int((tmp_path / f"state{task}").read_text()) > 0 for task in range(2))


def test_an_error_is_not_tried_again(tmp_path):
    job = Job(tmp_path / "log", "bash", "-c", "exit $((2 * SLURM_PROCID))")
    assert job.end() == ("FAILED", "2", "0")


@pytest.mark.parametrize(("end", "status"), [("kill -9 $$", "137"), (f"exit $(({LOST} * SLURM_PROCID))", str(LOST))])
def test_restarts_are_bounded(tmp_path, monkeypatch, end, status):
    monkeypatch.setenv("MAX_RESTARTS", "0")
    job = Job(tmp_path / "log", "bash", "-c", end)
    assert job.end() == ("FAILED", status, "0")
    assert job.said("not put back into the queue after 0 restarts")


def test_a_training_goes_on_after_a_task_was_killed(killed_training):
    wait_until(lambda: killed_training.facts()["Restarts"] == "1", seconds=60)
    killed_training.hurry()
    assert killed_training.end(seconds=240) == ("COMPLETED", "0", "1")
    log, workdir = killed_training.log.read_text(), killed_training.log.parent
    assert "error: process 1 of 2" in log and "back into the queue" in log
    assert "0: trained to step 200" in log
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 210, 10))
