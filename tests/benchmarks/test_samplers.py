"""Samplers compared: every setting once, from the same noise, in a table and a picture."""

import jax
import numpy as np
import pytest
from flax import nnx
from goldens.cases import TINY, seeded_dit
from PIL import Image

from dit_jax import DiTConfig, save_dit
from dit_jax.benchmarks import rates, samplers
from dit_jax.errors import InputError
from dit_jax.evaluation.classifier import write_classifier
from dit_jax.models.classifier import Classifier, ClassifierConfig

MODEL = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10)


@pytest.fixture
def weights(tmp_path):
    save_dit(seeded_dit(MODEL), tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


@pytest.fixture
def features(tmp_path):
    config = ClassifierConfig(image_size=8, channels=1, num_classes=10, width=4, features=3)
    params = nnx.to_pure_dict(nnx.state(Classifier(config, rngs=nnx.Rngs(0)), nnx.Param))
    write_classifier(tmp_path / "classifier.safetensors", config, params, {})
    return f"classifier:{tmp_path / 'classifier.safetensors'}"


def test_every_setting_has_its_row_and_its_point(tmp_path, weights, features):
    digits = np.asarray(jax.random.bits(jax.random.key(0), (20, 8, 8, 1), "uint8"))
    np.savez(tmp_path / "reference.npz", arr_0=digits)
    compared = (features, str(tmp_path / "reference.npz"))
    rows = samplers.compare(
        weights, "digits", 40, *compared, samplers=("ddim", "dpm-solver++"), steps=(1, 4), guidance=(1.0, 2.0)
    )
    assert [(row["sampler"], row["guidance"], row["steps"]) for row in rows] == [
        (sampler, scale, steps) for sampler in ("ddim", "dpm-solver++") for scale in (1.0, 2.0) for steps in (1, 4)
    ]
    assert [row["evaluations"] for row in rows] == [1, 4, 2, 8] * 2
    by_name = {row["name"]: row for row in rows}
    for scale in ("1", "2"):  # one step is the same for both, from the same noise
        one, other = (by_name[f"{name}, guidance {scale}, 1 steps"] for name in ("ddim", "dpm-solver++"))
        assert all(one[measure] == other[measure] for measure in samplers.MEASURES)
    assert all(row["classifier_frechet_distance"] > 0 for row in rows)
    assert "evaluations" in rates.table(rows) and "spread" in rates.table(rows)
    samplers.plot(rows, tmp_path / "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 1


def test_latents_are_refused(tmp_path):
    save_dit(seeded_dit(TINY), tmp_path / "latents.safetensors")
    with pytest.raises(InputError, match="draws latents"):
        samplers.compare(str(tmp_path / "latents.safetensors"), "digits", 40)
