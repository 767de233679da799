"""What launch/ starts: a pod of processes here, TPU pods through a stand-in gcloud, GKE through a stand-in kubectl."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from dit_jax.parallel.watch import LOST

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

STANDINS = Path(__file__).parent / "standins"
TRAINING = STANDINS / "training.py"


def local_pod(*args: str, **options) -> subprocess.Popen:
    command = [sys.executable, LAUNCH / "local_pod.py", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def test_local_pod_gives_every_host_its_place_its_devices_and_a_log(tmp_path):
    script = "import os, sys; print(os.environ['JAX_PLATFORMS'], os.environ['JAX_NUM_CPU_DEVICES'], *sys.argv[1:])"
    pod = local_pod("--hosts=3", "--devices=2", f"--log_dir={tmp_path}", "--", sys.executable, "-c", script, "--a=b c")
    shown, _ = pod.communicate(timeout=20)
    assert pod.returncode == 0
    logs = [(tmp_path / f"host{i}.log").read_text() for i in range(3)]
    assert shown == logs[0]
    address = re.search(r"--coordinator=127\.0\.0\.1:\d+", shown).group()
    for i, log in enumerate(logs):
        assert log == f"cpu 2 --a=b c {address} --num_processes=3 --process_id={i}\n"


def test_local_pod_shows_the_first_error_and_ends_hosts_that_hang(tmp_path):
    script = (
        "import sys, time\n"
        "print('begun', flush=True)\n"
        "if sys.argv[-1] == '--process_id=1':\n"
        "    raise ValueError('no such thing')\n"
        "time.sleep(1 if sys.argv[-1] == '--process_id=0' else 100)\n"
        "print('host 0 ended by itself')\n"
        "sys.exit(7)"
    )
    pod = local_pod("--hosts=3", "--patience=2", f"--log_dir={tmp_path}", "--", sys.executable, "-c", script)
    shown, errors = pod.communicate(timeout=20)
    assert pod.returncode == 1
    assert shown == "begun\nhost 0 ended by itself\n"
    first, second = errors.splitlines()
    assert first.startswith("host 1 ended with status 1: ValueError: no such thing")
    assert second == "host 2 still ran 2 s later: killed"


def test_local_pod_passes_signals_on_to_all(tmp_path):
    script = f"import sys; sys.argv[1:] = ['{tmp_path}/' + sys.argv[-1][2:], '100000']; exec(open('{TRAINING}').read())"
    pod = local_pod("--hosts=2", f"--log_dir={tmp_path}", "--", sys.executable, "-c", script)
    wait_until(lambda: all("from" in log.read_text() for log in tmp_path.glob("*.log")) and any(tmp_path.glob("*.log")))
    pod.terminate()
    shown, _ = pod.communicate(timeout=20)
    assert pod.returncode == 0 and "at step" in shown
    assert (tmp_path / "process_id=0").exists() and (tmp_path / "process_id=1").exists()


def test_local_pod_tells_of_a_host_that_was_killed(tmp_path):
    script = "import os, sys; sys.argv[-1][-1] == '1' and os.kill(os.getpid(), 9)"
    pod = local_pod("--hosts=2", f"--log_dir={tmp_path}", "--", sys.executable, "-c", script)
    _, errors = pod.communicate(timeout=20)
    assert pod.returncode == 128 + 9
    assert errors.startswith("host 1 was ended by SIGKILL: it said nothing")


def test_local_pod_dry_run_starts_nothing(tmp_path):
    pod = local_pod("--hosts=2", "--devices=4", f"--log_dir={tmp_path / 'logs'}", "--dry-run", "--", "train", "--x=1 2")
    shown, _ = pod.communicate(timeout=20)
    port = re.search(r"127.0.0.1:(\d+)", shown).group(1)
    assert shown.splitlines() == [
        f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 train '--x=1 2' --coordinator=127.0.0.1:{port} --num_processes=2 "
        f"--process_id={i} > {tmp_path}/logs/host{i}.log 2>&1"
        for i in range(2)
    ]
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """A folder in which stand-ins for gcloud and kubectl keep what they know; they are first on PATH."""
    monkeypatch.setenv("PATH", f"{STANDINS}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    for pid in tmp_path.glob("*/.dit_jax/[sr]u*"):  # supervisor and run, if a test left them
        with suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def asked(standin: Path) -> list[list[str]]:
    return [json.loads(line) for line in (standin / "asked").read_text().splitlines()]


def tpu_pod(*args: str) -> subprocess.CompletedProcess:
    command = ["bash", LAUNCH / "tpu_pod.sh", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


PLACE = "--zone=us-east5-b --project=p"


SSH = f"gcloud compute tpus tpu-vm ssh {{node}} {PLACE} --quiet --worker={{worker}} '--command={{command}}'"
DRY_RUNS = {
    ("--spot", "create"): [
        f"gcloud compute tpus queued-resources create xl {PLACE} --accelerator-type=v6e-16"
        " --runtime-version=v2-alpha-tpuv6e --node-id=xl --spot",
        f"gcloud compute tpus queued-resources describe xl {PLACE} '--format=value(state.state)'",
        f"tar -C {ROOT} -czf TMPDIR/dit_jax-xl.tar.gz (the files of the checkout)",
        f"gcloud compute tpus tpu-vm scp TMPDIR/dit_jax-xl.tar.gz xl:dit_jax.tar.gz {PLACE} --quiet --worker=all",
        SSH.format(
            node="xl",
            worker="all",
            command="mkdir -p dit_jax && tar -xzf dit_jax.tar.gz -C dit_jax"
            " && bash dit_jax/launch/tpu_worker.sh install && touch dit_jax/.installed",
        ),
    ],
    ("--slices=2", "run", "--", "python", "-m", "dit_jax.train", "--workdir=/mnt/my runs"): [
        SSH.format(
            node=node,
            worker="all",
            command="bash dit_jax/launch/tpu_worker.sh start python -m dit_jax.train --workdir=/mnt/my\\ runs",
        )
        for node in ("xl-0", "xl-1")
    ],
    ("--setup=mount /mnt || exit", "run", "--", "train"): [
        SSH.format(
            node="xl", worker="all", command="{ mount /mnt || exit; } && bash dit_jax/launch/tpu_worker.sh start train"
        )
    ],
    ("logs", "3"): [SSH.format(node="xl", worker=3, command="tail -n 100 -F dit_jax.log")],
    ("stop",): [SSH.format(node="xl", worker="all", command="bash dit_jax/launch/tpu_worker.sh stop")],
    ("delete",): [f"gcloud compute tpus queued-resources delete xl {PLACE} --force --quiet"],
}


@pytest.mark.parametrize("action", DRY_RUNS)
def test_tpu_pod_dry_run_prints_the_very_commands(standin, action):
    result = tpu_pod("--dry-run", "--name=xl", "--zone=us-east5-b", "--project=p", "--type=v6e-16", *action)
    assert result.returncode == 0 and not (standin / "asked").exists()
    assert result.stdout.splitlines() == [line.replace("TMPDIR", str(standin)) for line in DRY_RUNS[action]]


@pytest.mark.parametrize(
    ("told", "args"),
    [
        ("say what to do", []),
        ("unknown action fly", ["fly"]),
        ("unknown option --colour=red", ["--colour=red", "create"]),
        ("the command is missing", ["run"]),
    ],
)
def test_tpu_pod_refuses(standin, told, args):
    result = tpu_pod(*args)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and told in result.stderr


def test_tpu_pod_from_create_to_delete(standin):
    assert tpu_pod("create", "--poll=0.1").returncode == 0
    assert (standin / "pip").read_text().count("--editable .[tpu]") == 2  # on either worker
    workers = [standin / f"dit-worker{i}" for i in range(2)]
    assert all((worker / "dit_jax" / "dit_jax" / "train.py").exists() for worker in workers)
    run = ["run", "--", "bash", "-c", f"echo $LIBTPU_INIT_ARGS; exec python {TRAINING} $HOME/step 100000"]
    assert tpu_pod(*run).returncode == 0
    logs = [worker / "dit_jax.log" for worker in workers]
    wait_until(lambda: all("from step 0" in log.read_text() for log in logs))
    assert all("--xla_tpu_enable_data_parallel_all_reduce_opt=true" in log.read_text() for log in logs)
    second = tpu_pod(*run)
    assert second.returncode != 0 and "runs something already" in second.stderr
    status = tpu_pod("status").stdout.splitlines()
    assert status[0] == "dit is ACTIVE" and [line.split(": ")[1] for line in status[1:]] == ["running"] * 2
    assert tpu_pod("stop").returncode == 0
    wait_until(lambda: tpu_pod("status").stdout.count("stopped") == 2)
    assert all(int((worker / "step").read_text()) > 0 for worker in workers)
    assert tpu_pod("delete").returncode == 0
    assert tpu_pod("status").stdout == "dit is NONE\n"


@pytest.mark.parametrize("git", [True, False])
def test_tpu_pod_sends_the_project_and_not_what_runs_have_made(standin, git):
    checkout = standin / "checkout"
    for folder in ("configs", "dit_jax", "launch"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for name in (".gitignore", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    if git:
        subprocess.run("git init -q && git add .", shell=True, cwd=checkout, check=True)
    for made in ("samples.npz", "runs/xl/checkpoint", "configs/mine.py"):
        (checkout / made).parent.mkdir(parents=True, exist_ok=True)
        (checkout / made).write_text("made")
    assert tpu_pod(f"--checkout={checkout}", "--poll=0.1", "create").returncode == 0
    sent = standin / "dit-worker1" / "dit_jax"
    assert (sent / "configs" / "mine.py").read_text() == "made" and (sent / "pyproject.toml").exists()
    assert not (sent / "samples.npz").exists() and not (sent / "runs").exists()


def test_a_preempted_pod_comes_again_and_its_run_goes_on(standin):
    shared = standin / "shared"
    shared.mkdir()
    command = ["bash", "-c", f'exec python {TRAINING} {shared}/$(basename "$HOME") 100']
    forever = subprocess.Popen(
        ["bash", LAUNCH / "tpu_pod.sh", "--spot", "--poll=0.1", "run", "--forever", "--", *command],
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = [standin / f"dit-worker{i}" for i in range(2)]
    logs = [worker / "dit_jax.log" for worker in workers]
    wait_until(lambda: all(log.exists() and "from step 0" in log.read_text() for log in logs))
    (standin / "states").write_text("SUSPENDING\nSUSPENDED\n")
    for worker in workers:  # what a machine that is taken away does to all that runs on it
        for name in ("supervisor", "run"):
            os.kill(int((worker / ".dit_jax" / name).read_text()), signal.SIGTERM)
    said, _ = forever.communicate(timeout=40)
    assert forever.returncode == 0
    assert said.splitlines()[-1] == "== the run is finished"
    assert "dit is SUSPENDED: deleting it and asking for another" in said
    actions = []
    for _, _, _, action, *_, last in asked(standin):
        if action == "ssh":
            action = re.search(r"tpu_worker.sh (\w+)", last).group(1)
        if action not in ("describe", "status"):
            actions.append(action)
    once = ["create", "scp", "install", "start"]
    assert actions == [*once, "delete", *once]
    for log in logs:
        assert int(re.search(r"from step (\d+)", log.read_text()).group(1)) > 0 and "at step 100" in log.read_text()


def test_a_run_that_fails_on_a_healthy_pod_is_not_started_for_ever(standin):
    result = tpu_pod("--poll=0.1", "--retries=1", "run", "--forever", "--", "bash", "-c", "echo wrong; exit 3")
    assert result.returncode == 2 and "given up after 2 failures" in result.stderr
    for worker in range(2):
        assert (standin / f"dit-worker{worker}" / "dit_jax.log").read_text().count("\nwrong") == 2


def test_requests_that_fail_are_not_made_for_ever_and_the_reason_is_shown(standin):
    (standin / "outcome").write_text("FAILED")
    result = tpu_pod("--poll=0.1", "--retries=1", "run", "--forever", "--", "true")
    assert result.returncode == 2 and "given up after 2 failures" in result.stderr
    assert [words[3] for words in asked(standin)].count("create") == 2
    assert any(words[-1] == "--format=yaml(state)" for words in asked(standin))


def test_nothing_is_waited_for_where_gcloud_refuses_to_answer(standin):
    (standin / "refuses").write_text("ERROR: (gcloud) You have no active account.\nPlease run:\n  $ gcloud")
    result = tpu_pod("--poll=0.1", "run", "--forever", "--", "true")
    assert result.returncode == 2 and len(asked(standin)) == 1
    account, advice = result.stderr.splitlines()
    assert "active account" in account and "log in" in advice


@pytest.mark.parametrize(
    ("command", "state"), [(f"exit {LOST}", "preempted"), ("exit 3", "failed"), ("kill -9 $PPID", "failed")]
)
def test_a_worker_tells_how_its_run_ended(standin, command, state):
    def worker(*args: str) -> str:
        command, environment = ["bash", LAUNCH / "tpu_worker.sh", *args], os.environ | {"HOME": str(standin)}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    assert worker("status") == "idle"
    worker("start", "bash", "-c", command)
    wait_until(lambda: worker("status") == state)
    (standin / ".dit_jax" / "end").unlink(missing_ok=True)
    (standin / ".dit_jax" / "supervisor").write_text(str(os.getpid()))
    assert worker("status") == "running"
    (standin / ".dit_jax" / "boot").write_text("that of the day before")  # and the number is another process's now
    assert worker("status") == "preempted"
    (standin / ".dit_jax" / "supervisor").unlink()


def test_slurm_dry_run_prints_what_would_run():
    command = ["bash", "launch/slurm.sbatch", "--", "python", "-m", "dit_jax.train"]
    environment = os.environ | {"DRY_RUN": "1", "SLURM_CPUS_PER_TASK": "8"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [
        *("srun", "--cpus-per-task=8", "--label", "--kill-on-bad-exit=0", "--wait=90"),
        *("bash", f"{ROOT}/launch/slurm_task.sh", "python", "-m", "dit_jax.train"),
    ]


def test_gke_jobset_is_what_readme_applies(standin):
    subprocess.run(["kubectl", "apply", "-f", "launch/gke_jobset.yaml"], cwd=ROOT, check=True, capture_output=True)
    assert asked(standin) == [["apply", "-f", "launch/gke_jobset.yaml"]]
    jobset = yaml.safe_load((standin / "applied.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert jobset["spec"]["coordinator"]["replicatedJob"] == slices["name"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = int(topology.split("x")[0]) * int(topology.split("x")[1])
    assert job["completions"] == job["parallelism"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # Preemption fails the job for a reason of its own, and this reason does not count.
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [LOST, 143]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


@pytest.mark.parametrize(("last", "status"), [("3", 0), ("100000", 143)])
def test_a_gke_pod_that_had_to_stop_does_not_look_finished(tmp_path, last, status):
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    script, zero, *_ = container["args"]
    command = [*container["command"], script, zero, sys.executable, TRAINING, tmp_path / "step", last]
    pod = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert pod.stdout.readline() == "from step 0\n"
    if status:
        pod.terminate()
    assert pod.wait(timeout=20) == status
    assert int((tmp_path / "step").read_text()) > 0


def test_xla_knows_every_flag():
    script = "source launch/xla_flags.sh && exec $PYTHON -c 'import jax; print(jax.devices())'"
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_shell_scripts_are_clean():
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
