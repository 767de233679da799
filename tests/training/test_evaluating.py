"""Figures in the middle of a run: the same for the same weights, under honest names, and settings that do not fit."""

import json

import jax
import numpy as np
import pytest

from dit_jax.checkpoints.files import open_weights
from dit_jax.config import base_config
from dit_jax.data.sources import open_source
from dit_jax.errors import InputError
from dit_jax.evaluation import classifier
from dit_jax.evaluation.classifier import train_classifier, write_classifier
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training.evaluating import make_evaluation
from dit_jax.training.loop import train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on digits that is measured at steps 4 and 8; the reference is an .npz of pictures."""
    folder = tmp_path_factory.mktemp("evaluating")
    digits = open_source("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 5)
        network, params, _ = train_classifier(digits, 8)
    write_classifier(folder / "digits.safetensors", network, params, {})
    np.savez(folder / "reference.npz", arr_0=digits.images[:200])
    c = base_config()
    c.update(steps=8, batch_size=16, log_every=8, ema_decay=0.5)
    c.optimizer.learning_rate = 1e-2
    c.data.update(source="digits", threads=1)
    c.model.update(input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=1, num_heads=2)
    c.preview.every = 0
    c.sample.update(sampler="ddim", steps=3, guidance=2.0)
    c.eval.update(every=4, count=21, batch=8, reference=str(folder / "reference.npz"))
    c.eval.features = f"classifier:{folder / 'digits.safetensors'}"
    return c


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *args, devices=jax.devices: devices(*args)[:1])


def changed(config, **fields):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(fields)
    return other


def test_a_run_writes_figures_that_say_what_they_are(tmp_path, config):
    train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = {f"eval/classifier_{name}_21" for name in ("frechet_distance", "score", "precision", "recall")}
    assert [line["step"] for line in lines] == [4, 8, 8]
    assert lines[0].keys() - {"step"} == lines[2].keys() - {"step"} == names and "loss" in lines[1]
    assert lines[0] != lines[2] | {"step": 4}
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        again = make_evaluation(config, mesh, None)(open_weights(tmp_path).params())
        other = make_evaluation(changed(config, **{"eval.batch": 21}), mesh, None)(open_weights(tmp_path).params())
    for figures in (again, other):
        assert figures == pytest.approx({name: lines[2][name] for name in names}, rel=1e-3)


@pytest.mark.parametrize(
    ("told", "changes"),
    [
        ("needs config.eval.reference", {"eval.reference": ""}),
        ("no file or folder nowhere.npz", {"eval.reference": "nowhere.npz"}),
        ("there is no file nowhere.safetensors", {"eval.features": "classifier:nowhere.safetensors"}),
        (r"holds pictures of 8x8x1, the model draws 16x16x1", {"model.input_size": 16}),
        ("config.eval.count holds 3 images: expected at least 4", {"eval.count": 3}),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, told, changes):
    with pytest.raises(InputError, match=told):
        make_evaluation(changed(config, **changes), make_mesh(), None)


def test_nothing_is_measured_unless_asked(config):
    assert make_evaluation(base_config(), make_mesh(), None) is None
