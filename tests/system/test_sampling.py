"""Sampling as typed: killed, stopped and started again, it ends with the file of an unbroken run."""

import re
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
from commands import PATIENCE, Command, succeeds
from goldens.cases import seeded_dit

from dit_jax import DiTConfig, save_dit
from dit_jax.files import read_npz

MODEL = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_dit(seeded_dit(MODEL), path)
    return path


def sample(weights, out, count=700, batch=32) -> list[str]:
    args = [f"--weights={weights}", f"--out={out}", "--labels=random", f"--count={count}", f"--batch={batch}"]
    return ["sample", *args, "--steps=100", "--guidance=2"]


def parts(out) -> dict[str, int]:
    """Finished parts, each with what tells whether it was written again."""
    return {path.name: path.stat().st_ino for path in out.with_name(f"{out.name}.parts").glob("[0-9]*.npy")}


def interrupted(process: Command, number: signal.Signals, when: Callable[[], bool]) -> str:
    """Signal the process when that is so; returns its last line."""
    deadline = time.monotonic() + PATIENCE
    try:
        while not when():
            assert process.status is None and time.monotonic() < deadline, process.stderr
            time.sleep(0.005)
        process.send(number)
        assert process.wait(40) == (-signal.SIGKILL if number == signal.SIGKILL else 1), process.stderr
    finally:
        process.kill()
    return process.stderr.splitlines()[-1]


def test_killed_and_stopped_in_the_middle_it_ends_with_the_same_bytes_and_redoes_no_part(tmp_path, weights):
    unbroken, out = tmp_path / "unbroken.npz", tmp_path / "out.npz"
    result = succeeds(*sample(weights, unbroken))
    assert f"wrote {unbroken}" in result.stdout
    assert re.search(r"700/700 \[[\d:]+<[\d:]+, +[\d.]+image/s\]", result.stderr), "no rate and time left"

    interrupted(Command(*sample(weights, out)), signal.SIGKILL, lambda: parts(out))
    killed = parts(out)
    line = interrupted(Command(*sample(weights, out)), signal.SIGTERM, lambda: len(parts(out)) > len(killed))
    assert re.match(r"stopped after \d+ of 700 images; the same command goes on", line)
    assert not out.exists()
    stopped = parts(out)
    assert len(killed) < len(stopped) < 6 and killed.items() <= stopped.items()

    succeeds(*sample(weights, out))
    assert out.read_bytes() == unbroken.read_bytes() and not parts(out)
    assert len(np.unique(read_npz(out, ("labels",))["labels"])) == 10


@pytest.mark.parametrize(
    ("name", "then"), [("out.npz", "goes on"), ("grid.png", "begins anew, since a grid is kept whole")]
)
def test_it_stops_in_the_midst_of_a_batch(tmp_path, weights, name, then):
    """Drawing them all takes minutes."""
    process = Command(*sample(weights, tmp_path / name, count=100_000, batch=100_000))
    line = interrupted(process, signal.SIGINT, lambda: "0/100000" in process.stderr)
    assert line == f"stopped after 0 of 100000 images; the same command {then}"
    assert not (tmp_path / name).exists()
