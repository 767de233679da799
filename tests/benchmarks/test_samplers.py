"""Samplers compared: every setting once, from the same noise, in a table and a picture."""

import numpy as np
import pytest
from goldens.cases import TINY, seeded_dit
from PIL import Image

from dit_jax import DiTConfig, save_dit
from dit_jax.benchmarks import rates, samplers
from dit_jax.benchmarks.peers import diffusers_sampler
from dit_jax.checkpoints.files import load_dit
from dit_jax.errors import InputError

MODEL = DiTConfig(input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10)


@pytest.fixture
def weights(tmp_path):
    save_dit(seeded_dit(MODEL), tmp_path / "tiny.safetensors")
    return str(tmp_path / "tiny.safetensors")


def test_every_setting_has_its_row_and_its_point(tmp_path, weights):
    rows = samplers.compare(weights, "digits", 40, samplers=("ddim", "dpm-solver++"), steps=(1, 4), guidance=(1.0, 2.0))
    assert [(row["sampler"], row["guidance"], row["steps"]) for row in rows] == [
        (sampler, scale, steps) for sampler in ("ddim", "dpm-solver++") for scale in (1.0, 2.0) for steps in (1, 4)
    ]
    assert [row["evaluations"] for row in rows] == [1, 4, 2, 8] * 2
    by_name = {row["name"]: row for row in rows}
    for scale in ("1", "2"):  # one step is the same for both, from the same noise
        one, other = (by_name[f"{name}, guidance {scale}, 1 steps"] for name in ("ddim", "dpm-solver++"))
        assert all(one[measure] == other[measure] for measure in samplers.MEASURES)
    assert "evaluations" in rates.table(rows) and "spread" in rates.table(rows)
    samplers.plot(rows, tmp_path / "plot.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 1


def test_latents_are_refused(tmp_path):
    save_dit(seeded_dit(TINY), tmp_path / "latents.safetensors")
    with pytest.raises(InputError, match="draws latents"):
        samplers.compare(str(tmp_path / "latents.safetensors"), "digits", 40)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_the_peer_draws_with_each_sampler(weights, sampler):
    process = {"steps": 1000, "schedule": "linear"}
    settings = {"sampler": sampler, "steps": 4, "guidance": 2.0, "clip_denoised": True}
    pictures = diffusers_sampler(load_dit(weights), process, settings, np.arange(3, dtype=np.int32))()
    assert pictures.shape == (3, 1, 8, 8) and np.isfinite(pictures.numpy()).all() and float(pictures.std()) > 0
