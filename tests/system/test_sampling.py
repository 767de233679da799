"""Sampling as typed: killed, stopped and started again, it ends with the file of an unbroken run."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from goldens.cases import seeded_dit

from dit_jax import DiTConfig, save_dit
from dit_jax.files import read_npz

MODEL = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_dit(seeded_dit(MODEL), path)
    return path


def start(weights, out, count=700, batch=32) -> subprocess.Popen:
    command = [sys.executable, "-m", "dit_jax.sample", f"--weights={weights}", f"--out={out}", "--labels=random"]
    command += [f"--count={count}", f"--batch={batch}", "--steps=250", "--guidance=2"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)


def parts(out) -> dict[str, int]:
    """Finished parts, each with what tells whether it was written again."""
    return {path.name: path.stat().st_ino for path in out.with_name(f"{out.name}.parts").glob("[0-9]*.npy")}


def interrupted(process: subprocess.Popen, out, number: signal.Signals, after: int) -> str:
    """Signal the process when so many parts are there; returns its last line."""
    deadline = time.monotonic() + 120
    while len(parts(out)) < after:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    line = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 1)
    assert not out.exists()
    return line


def test_killed_and_stopped_in_the_middle_it_ends_with_the_same_bytes_and_redoes_no_part(tmp_path, weights):
    unbroken, out = tmp_path / "unbroken.npz", tmp_path / "out.npz"
    process = start(weights, unbroken)
    printed, told = process.communicate(timeout=180)
    assert process.returncode == 0 and f"wrote {unbroken}" in printed, told
    assert re.search(r"700/700 \[[\d:]+<[\d:]+, +[\d.]+image/s\]", told), "no rate and time left"

    interrupted(start(weights, out), out, signal.SIGKILL, after=1)
    killed = parts(out)
    line = interrupted(start(weights, out), out, signal.SIGTERM, after=len(killed) + 1)
    assert re.match(r"stopped after \d+ of 700 images; the same command goes on", line)
    stopped = parts(out)
    assert len(killed) < len(stopped) < 6 and killed.items() <= stopped.items()

    process = start(weights, out)
    assert process.wait(180) == 0, process.communicate()
    assert out.read_bytes() == unbroken.read_bytes() and not parts(out)
    assert len(np.unique(read_npz(out, ("labels",))["labels"])) == 10


@pytest.mark.parametrize(
    ("name", "then"), [("out.npz", "goes on"), ("grid.png", "begins anew, since a grid is kept whole")]
)
def test_it_stops_in_the_midst_of_a_batch(tmp_path, weights, name, then):
    process, seen = start(weights, tmp_path / name, count=100_000, batch=100_000), ""
    try:
        while "0/100000" not in seen:
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        process.send_signal(signal.SIGINT)
        line = process.communicate(timeout=40)[1].splitlines()[-1]  # drawing them all takes minutes
    finally:
        process.kill()
    assert line == f"stopped after 0 of 100000 images; the same command {then}" and process.returncode == 1
