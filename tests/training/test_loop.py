"""A whole run: broken off and gone on with, moved to another mesh, diverged, damaged. Real processes and files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dit_jax import load_dit
from dit_jax.config import base_config
from dit_jax.errors import InputError
from dit_jax.training import loop, resume
from dit_jax.training.loop import DivergedError, train

# Runs the train command, and sends itself a signal when a given step has been dispatched.
INTERRUPTED = """
import os, sys
from dit_jax import cli, train
from dit_jax.training.metrics import TrainingLog
dispatched = TrainingLog.dispatched
def interrupted(self, step, metrics):
    if step == {at}:
        os.kill(os.getpid(), {number})
    dispatched(self, step, metrics)
TrainingLog.dispatched = interrupted
sys.argv = ["train", "--config={config}", "--workdir={workdir}"]
cli.run(train.main)
"""


def small_config(**changes) -> ConfigDict:
    config = base_config()
    config.steps = 60
    config.batch_size = 16
    config.ema_decay = 0.9
    config.data.source = "digits"
    config.data.threads = 2
    config.model.update(input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=2, num_heads=2)
    config.optimizer.update(learning_rate=1e-2, decay="cosine")
    config.mesh.update(data=1)
    config.log_every = 8  # which does not divide the checkpoints' interval
    config.checkpoint.update(every=20, keep=3)
    config.preview.update(every=0, count=8)
    config.sample.update(sampler="ddim", steps=3, guidance=2.0)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *args, devices=jax.devices: devices(*args)[:1])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args, devices=jax.devices: devices(*args)[:1])
        workdir = tmp_path_factory.mktemp("unbroken")
        train(small_config(**{"preview.every": 30}), workdir)
    return workdir


def interrupt(workdir: Path, config: ConfigDict, number: signal.Signals, at: int) -> subprocess.CompletedProcess:
    """Train in a process of its own that gets a signal at step `at`."""
    workdir.mkdir(exist_ok=True)
    path = workdir.parent / "config_of_the_run.py"
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({config.to_dict()})"
    )
    script = INTERRUPTED.format(at=at, number=int(number), config=path, workdir=workdir)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        timeout=120,
    )


def metrics(workdir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def arrays(workdir: Path, step: int = 60) -> list[np.ndarray]:
    """Weights, average and moments of a checkpoint, as they are on disk."""
    store = loop.CheckpointStore(workdir / "checkpoints", write=False)
    assert store.steps()[0] == step
    _, state, _ = resume.restore(store, small_config(), loop.make_mesh(devices=jax.devices()[:1]))
    store.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_equal_runs(a: Path, b: Path):
    assert metrics(a) == metrics(b)
    assert all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def test_a_run_leaves_what_it_promises(unbroken):
    steps = [line["step"] for line in metrics(unbroken)]
    assert steps == list(range(8, 57, 8))
    line = json.loads((unbroken / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"loss", "mse", "vb", "grad_norm", "param_norm", "learning_rate", "images_per_second"}
    assert wanted | {"step"} == line.keys()
    assert json.loads((unbroken / "config.json").read_text()) == json.loads(
        small_config(**{"preview.every": 30}).to_json()
    )
    assert sorted(path.name for path in (unbroken / "previews").iterdir()) == ["0000030.png", "0000060.png"]
    assert any(path.stat().st_size > 500 for path in (unbroken / "tensorboard").iterdir())
    assert {path.name for path in (unbroken / "checkpoints").iterdir()} == {"20", "40", "60"}


def test_it_learns(unbroken):
    lines = metrics(unbroken)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]


def test_averaged_and_raw_weights_load_as_models(unbroken):
    averaged, raw = load_dit(unbroken), load_dit(unbroken, weights="model")
    weights = [model.to_state_dict()["final_layer.linear.weight"] for model in (averaged, raw)]
    assert np.abs(weights[0]).max() > 0 and not np.array_equal(*weights)


def test_a_killed_run_ends_bit_equal_to_an_unbroken_one(tmp_path, unbroken):
    killed = interrupt(tmp_path / "run", small_config(), signal.SIGKILL, 37)
    assert killed.returncode == -signal.SIGKILL
    assert train(small_config(), tmp_path / "run") == 60
    assert_equal_runs(tmp_path / "run", unbroken)


def test_a_stopped_run_saves_says_how_to_go_on_and_ends_bit_equal(tmp_path, unbroken):
    stopped = interrupt(tmp_path / "run", small_config(), signal.SIGINT, 27)
    assert stopped.returncode == 0, stopped.stderr
    assert "saved at step 27 of 60; the same command goes on" in stopped.stdout
    assert (tmp_path / "run" / "checkpoints" / "27").is_dir()
    assert train(small_config(), tmp_path / "run") == 60
    assert_equal_runs(tmp_path / "run", unbroken)


def test_a_finished_run_is_left_as_it_is(unbroken, capsys):
    before = metrics(unbroken)
    assert train(small_config(**{"preview.every": 30}), unbroken) == 60
    assert metrics(unbroken) == before


def test_a_run_goes_on_on_another_mesh(tmp_path, unbroken, monkeypatch):
    monkeypatch.undo()
    eight = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), (8, 1, 1), strict=True))
    train(small_config(steps=40, **{"optimizer.decay": "constant"}, **eight), tmp_path / "run")
    split = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), (1, 4, 2), strict=True))
    train(small_config(**{"optimizer.decay": "constant"}, **split), tmp_path / "run")
    train(small_config(**{"optimizer.decay": "constant"}, **eight), tmp_path / "straight")
    there, here = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "straight"))
    np.testing.assert_allclose(there, here, rtol=1e-5)


def test_an_unconditional_model_trains_on_labelled_images_and_previews_any_number(tmp_path, monkeypatch):
    monkeypatch.undo()
    changes = {"model.num_classes": 1, "model.class_dropout_prob": 0.0, "sample.guidance": 1.0, "mesh.data": 8}
    train(small_config(steps=3, **changes, **{"preview.every": 3, "preview.count": 5}), tmp_path)
    assert (tmp_path / "previews" / "0000003.png").exists()
    assert load_dit(tmp_path).to_state_dict()["y_embedder.embedding_table.weight"].shape == (1, 16)


def test_the_step_is_compiled_once(tmp_path, monkeypatch):
    steps = []
    make = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *args: steps.append(make(*args)) or steps[-1])
    train(small_config(steps=25), tmp_path)
    assert [step._cache_size() for step in steps] == [1]


def test_the_first_save_finds_its_programs_compiled(tmp_path, monkeypatch, caplog):
    save, saved = resume.save, []

    def watched(store, step, *args, **kwargs):
        saved.append(step)
        with jax.log_compiles():
            save(store, step, *args, **kwargs)

    monkeypatch.setattr(resume, "save", watched)
    train(small_config(steps=3, **{"checkpoint.every": 2, "model.hidden_size": 20}), tmp_path)  # no other test's shapes
    assert saved == [2, 3] and not [line for line in caplog.messages if "ompil" in line]


@pytest.mark.parametrize("at", [33, 40])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(tmp_path, monkeypatch, at):
    def poisoned(*args, make=loop.make_train_step):
        step = make(*args)

        def poisoned_step(state, batch, frozen):
            return step(state, batch | {"x": batch["x"] * (np.nan if state.step == at - 1 else 1)}, frozen)

        poisoned_step.lower = step.lower
        return poisoned_step

    with monkeypatch.context() as patch, pytest.raises(DivergedError, match=rf"step {at}: .*loss=nan.*checkpoints/20"):
        patch.setattr(loop, "make_train_step", poisoned)
        train(small_config(), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"20"}
    assert train(small_config(steps=30), tmp_path) == 30


def truncate(checkpoint: Path):
    files = [path for path in checkpoint.rglob("*") if path.is_file() and "/d/" in str(path)]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes(checkpoint: Path):
    largest = max(
        (path for path in (checkpoint / "model").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(255 - byte for byte in data[middle : middle + 64])
    largest.write_bytes(data)


def lose_record(checkpoint: Path):
    for path in (checkpoint / "record").iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_bytes, lose_record])
def test_a_damaged_checkpoint_is_passed_over_and_its_steps_come_again(tmp_path, unbroken, capsys, damage):
    train(small_config(steps=40), tmp_path)
    damage(tmp_path / "checkpoints" / "40")
    assert train(small_config(steps=40), tmp_path) == 40
    told = capsys.readouterr().err
    assert "checkpoints/40 cannot be read" in told and "trying the one before" in told
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"20", "40"}
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["40"]


def test_when_all_checkpoints_are_damaged_the_run_does_not_start_over(tmp_path):
    train(small_config(steps=20), tmp_path)
    truncate(tmp_path / "checkpoints" / "20")
    with pytest.raises(InputError, match=r"not one of the checkpoints \[20\]"):
        train(small_config(steps=20), tmp_path)


def test_another_architecture_is_refused_and_nothing_changes(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    with pytest.raises(InputError, match="depth=2 there, 3 here"):
        train(small_config(**{"model.depth": 3}), unbroken)
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_newest_checkpoints_and_milestones_are_kept(tmp_path):
    train(small_config(**{"checkpoint.every": 5, "checkpoint.keep": 2, "checkpoint.keep_every": 25}), tmp_path)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {25, 50, 55, 60}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.in_channels": 4}, "set --config.model.in_channels=1"),
        ({"model.num_classes": 1000}, "set --config.model.num_classes=10"),
        ({"model.learn_sigma": False}, "learned_range needs learn_sigma=True"),
        ({"batch_size": 15, "accumulate": 2}, "choose a multiple of 2"),
        ({"mesh.data": 3}, "does not fit"),
        ({"steps": -1}, "expected 0 or more"),
        ({"ema_decay": 1.5}, "expected 0 to 1"),
        ({"optimizer.learning_rate": float("nan")}, "expected 0 or more"),
        ({"log_every": 0}, "log_every=0: expected 1 or more"),
        ({"checkpoint.keep": 0}, "expected 1 or more"),
        ({"model.mlp_ratio": 0.0}, "at least 1 wide"),
        ({"model.unroll": -1}, "and unroll are 0 or positive"),
        ({"model.depth": 10**12}, "depth=1000000000000: expected 1 to 1000000"),
        ({"sample.guidance": float("nan")}, "expected a finite number"),
        ({"data.source": "nonsense"}, "unknown data source"),
        ({"sample.sampler": "euler"}, "ddpm, ddim"),
        ({"sample.steps": 2000}, "2000"),
        ({"optimizer.decay": "linear"}, "constant or cosine"),
        ({"diffusion.schedule": "quadratic"}, "squaredcos_cap_v2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_written(tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
