"""What a run does with the `metrics.jsonl` that it finds, what a checkpoint is told of a line, and what is imported."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from dit_jax.errors import InputError
from dit_jax.training import metrics
from dit_jax.training.metrics import NotFiniteError, TrainingLog


def open_log(workdir, first_step, log_every=1, **changes):
    sizes = {"log_every": log_every, "batch_size": 1, "flops_per_image": 1, "peak_flops": None} | changes
    return TrainingLog(workdir, first_step=first_step, last_step=9, **sizes)


def lines_of(*steps):
    return "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)


def test_lines_after_the_step_and_one_that_a_kill_cut_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines_of(1, 2, 3) + '{"step": 4, "lo')
    open_log(tmp_path, first_step=2)
    assert file.read_text() == lines_of(1, 2)


@pytest.mark.parametrize("line", ["garbage}", "[1]", '{"step": "two"}', "", "\0\0"])
def test_a_line_of_another_hand_is_named_and_the_file_left(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(before := lines_of(1) + line + "\n" + lines_of(3))
    with pytest.raises(InputError, match=f"line 2 of {file} "):
        open_log(tmp_path, first_step=9)
    assert file.read_text() == before


def test_what_a_checkpoint_holds_of_a_line_stays_as_it_was_while_steps_are_added(tmp_path):
    with open_log(tmp_path, first_step=0, log_every=3) as log:
        asked = []
        for step in range(1, 6):
            log.dispatched(step, {"loss": jnp.float32(step)})
            asked.append(log.unfinished())
    counts = [(line["count"], line["sums"].get("loss")) for line in (ask() for ask in asked)]
    assert counts == [(1, 1.0), (2, 3.0), (0, None), (1, 4.0), (2, 9.0)]


def test_images_a_second_and_utilisation_leave_out_the_first_step_and_what_is_done_in_a_pause(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    with open_log(tmp_path, first_step=0, log_every=2, batch_size=8, flops_per_image=50, peak_flops=1000.0) as log:
        for step in range(1, 6):
            clock[0] += 2.0 if step > 1 else 60.0
            log.dispatched(step, {"loss": jnp.float32(step)})
            if step == 3:
                with log.pause():
                    clock[0] += 1000.0
        log.catch_up()
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], first["loss"]) == (2, 1.5) and (second["step"], second["loss"]) == (4, 3.5)
    for line in (first, second):
        assert line["images_per_second"] == 4 and line["mfu"] == 4 * 50 / 1000


@pytest.mark.parametrize("step", [2, 3])
def test_a_checkpoint_is_told_of_a_step_that_is_not_finite_and_the_run_stopped_by_it(tmp_path, step):
    with open_log(tmp_path, first_step=0, log_every=3) as log:
        log.dispatched(1, {"loss": jnp.float32(1)})
        log.dispatched(step, {"loss": jnp.float32("nan")})
        assert log.unfinished()() is None
        with pytest.raises(NotFiniteError, match=f"step {step}: loss=nan"):
            log.catch_up()


def test_pytorch_is_not_imported(tmp_path):
    script = (
        "import sys; from pathlib import Path; from dit_jax.training.metrics import TrainingLog\n"
        "sizes = {'log_every': 1, 'batch_size': 1, 'flops_per_image': 1, 'peak_flops': None}\n"
        "TrainingLog(Path(sys.argv[1]), first_step=0, last_step=9, **sizes)\n"
        "print('torch' in sys.modules, 'tensorboardX' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert shown.stdout.split() == ["False", "True"], shown.stderr
