"""One program in several processes: real ones, on this machine, that are stopped, killed and started again."""

import json
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import PATIENCE, Command
from flax import nnx

from dit_jax.evaluation.classifier import write_classifier
from dit_jax.files import read_npz
from dit_jax.models.classifier import Classifier, ClassifierConfig
from dit_jax.parallel.watch import LOST

SMALL = [
    "--config=configs/digits.py",
    "--config.model.hidden_size=16",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
    "--config.batch_size=16",
    "--config.data.flip=true",
    "--config.optimizer.decay=constant",  # so that runs of other lengths are the same program
    "--config.sample.steps=2",
    "--config.preview.count=10",
    "--config.log_every=1",
]

# The parts in which it writes a line: those of two threads may be mixed.
SAID_BY_GLOO = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |[\d\s]"


class Pod:
    """A command in so many processes with so many devices each."""

    def __init__(self, count: int, devices: int, *args: str | Path, of_process: dict[int, list[str]] | None = None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = []
        for i in range(count):
            joining = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
            command = [*args, *(joining if count > 1 else []), *(of_process or {}).get(i, [])]
            self.processes.append(Command(*command, devices=devices))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline or any(process.status is not None for process in self.processes):
                self.kill()
                raise AssertionError(self.account())
            time.sleep(0.02)

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """The exit statuses."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def succeeds(self) -> str:
        """What the first process printed; the others print nothing, and on stderr nothing but libraries' logs."""
        assert self.wait() == [0] * len(self.processes), self.account()
        for process in self.processes[1:]:
            assert not re.sub(SAID_BY_GLOO, "", process.stdout), self.account()
            lines = process.stderr.splitlines()
            assert not [line for line in lines if not re.match(r"[IWE]\d{4} ", line)], self.account()
        return self.processes[0].stdout

    def account(self) -> str:
        told = [f"--- process {i}\n{p.stdout[-3000:]}\n{p.stderr[-3000:]}" for i, p in enumerate(self.processes)]
        return "\n".join(told)


def train(folder: Path, name: str, count: int, devices: int, *args: str, **more) -> Pod:
    """The train command for the run `name`."""
    return Pod(count, devices, "train", *SMALL, f"--workdir={folder / name}", *args, **more)


def losses(workdir: Path) -> dict[int, float]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def test_four_processes_train_like_one_and_each_resumes_the_others_checkpoint(tmp_path):
    for name, count, devices in (("one", 1, 8), ("four", 4, 2)):
        previews = f"--config.preview.every={10 * (count == 4)}"
        pod = train(tmp_path, name, count, devices, *MESH, previews, "--config.steps=10", "--config.checkpoint.every=5")
        assert "trained to step 10" in pod.succeeds()
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert list(one) == list(four) == list(range(1, 11))
    np.testing.assert_allclose(list(four.values()), list(one.values()), rtol=1e-6)
    assert (tmp_path / "four" / "previews" / "0000010.png").exists()
    for name, count, devices in (("one", 4, 2), ("four", 1, 8)):
        train(tmp_path, name, count, devices, *MESH, "--config.preview.every=0", "--config.steps=14").succeeds()
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert list(one) == list(four) == list(range(1, 15))
    np.testing.assert_allclose(list(four.values()), list(one.values()), rtol=1e-6)


FOR_LONG = ["--config.steps=1000000", "--config.preview.every=0", "--config.checkpoint.every=10"]


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_process_makes_all_save_the_same_step(tmp_path, number, to):
    pod = train(tmp_path, "run", 2, 1, *FOR_LONG)
    pod.wait_until(lambda: len(losses(tmp_path / "run")) > 3)
    pod.processes[to].send(number)
    stopped = int(re.search(r"stopped and saved at step (\d+)", pod.succeeds())[1])
    assert checkpoints(tmp_path / "run")[-1] == max(losses(tmp_path / "run")) == stopped
    more = train(tmp_path, "run", 1, 1, *FOR_LONG, f"--config.steps={stopped + 2}")
    assert f"trained to step {stopped + 2}" in more.succeeds()
    assert list(losses(tmp_path / "run")) == list(range(1, stopped + 3))


def test_when_a_process_is_killed_the_others_name_it_and_end_and_the_run_goes_on(tmp_path):
    pods = {killed: train(tmp_path, f"run{killed}", 2, 1, *FOR_LONG) for killed in (0, 1)}
    for killed, pod in pods.items():
        pod.wait_until(lambda killed=killed: checkpoints(tmp_path / f"run{killed}"))
    for killed, pod in pods.items():
        pod.processes[killed].kill()
    for killed, pod in pods.items():
        statuses = pod.wait(timeout=60)
        assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] == LOST, pod.account()
        line = pod.processes[1 - killed].stderr.splitlines()[-1]
        assert line.startswith(f"error: process {killed} of 2 (host {socket.gethostname()}) is missing"), pod.account()
        assert line.endswith("the same command goes on from the last checkpoint")
    saved = checkpoints(tmp_path / "run0")[-1]
    pod = train(tmp_path, "run0", 2, 1, *FOR_LONG, f"--config.steps={saved + 2}")
    assert f"trained to step {saved + 2}" in pod.succeeds()
    assert list(losses(tmp_path / "run0")) == list(range(1, saved + 3))


@pytest.mark.parametrize(("command", "failing"), [("train", 0), ("encode", 1)])
def test_an_error_in_one_process_ends_the_others_who_tell_it(tmp_path, command, failing):
    if command == "train":
        pod = train(tmp_path, "run", 2, 1, *FOR_LONG, of_process={failing: ["--config.data.source=folder:/nowhere"]})
    else:
        args = ["--data=digits", "--autoencoder=identity", "--image_size=8", f"--out={tmp_path / 'latents'}"]
        pod = Pod(2, 1, "encode", *args, of_process={failing: ["--data=folder:/nowhere"]})
    statuses = pod.wait(timeout=60)
    assert statuses[failing] == 2 and statuses[1 - failing] == 1, pod.account()
    assert "error: " in pod.processes[failing].stderr and "/nowhere" in pod.processes[failing].stderr
    line = pod.processes[1 - failing].stderr.strip().splitlines()[-1]
    assert re.match(rf"error: process {failing} of 2 \(host .*\) has ended: .*/nowhere", line), pod.account()


def test_two_processes_draw_the_pictures_of_one(tmp_path):
    train(tmp_path, "run", 1, 1, "--config.steps=2", "--config.preview.every=0").succeeds()
    pictures = []
    for count in (1, 2):
        args = [f"--weights={tmp_path / 'run'}", f"--out={tmp_path / f'{count}.npz'}", "--count=150", "--batch=32"]
        printed = Pod(count, 2, "sample", *args).succeeds()
        assert printed.count("wrote") == 1
        pictures.append(read_npz(tmp_path / f"{count}.npz", ("arr_0",))["arr_0"].astype(int))
    assert pictures[0].shape == (150, 8, 8, 1)
    assert np.abs(pictures[1] - pictures[0]).max() <= 1 and (pictures[1] != pictures[0]).mean() <= 1e-4


def test_two_processes_measure_what_one_does(tmp_path):
    config = ClassifierConfig(image_size=8, channels=1, num_classes=10, width=4, features=3)
    params = nnx.to_pure_dict(nnx.state(Classifier(config, rngs=nnx.Rngs(0)), nnx.Param))
    write_classifier(tmp_path / "classifier.safetensors", config, params, {})
    rng, args = np.random.default_rng(0), [f"--features=classifier:{tmp_path / 'classifier.safetensors'}", "--batch=16"]
    for name, count in (("samples", 50), ("reference", 39)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8))
        args.append(f"--{name}={tmp_path / name}.npz")
    figures = []
    for count in (1, 2):
        report = tmp_path / f"{count}.json"
        printed = Pod(count, 2, "evaluate", *args, f"--json={report}").succeeds()
        assert printed.count("wrote") == 1
        figures.append(json.loads(report.read_text())["metrics"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5) and len(figures[0]) == 4


def test_two_processes_are_measured_as_one_system(tmp_path):
    for part in ("train", "sample"):
        report = tmp_path / f"{part}.json"
        printed = Pod(2, 2, "benchmark", part, *SMALL, "--repeats=1", f"--json={report}").succeeds()
        (row,) = json.loads(report.read_text())
        assert f"{row['median']:.2f}" in printed and row["name"].startswith(part)
