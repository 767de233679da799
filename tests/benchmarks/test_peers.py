"""PyTorch beside ours: where ours computes, and in its dtype."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from goldens.cases import TINY, seeded_dit

from dit_jax.benchmarks.peers import device, diffusers_dit, diffusers_sampler
from dit_jax.errors import InputError


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_the_peer_draws_with_each_sampler(sampler):
    process = {"steps": 1000, "schedule": "linear"}
    settings = {"sampler": sampler, "steps": 4, "guidance": 2.0, "clip_denoised": True}
    pictures = diffusers_sampler(seeded_dit(TINY), process, settings, np.arange(3, dtype=np.int32))()
    assert pictures.shape == (3, 4, 8, 8) and np.isfinite(pictures.numpy()).all() and float(pictures.std()) > 0


@pytest.mark.parametrize(("dtype", "theirs"), [("float32", torch.float32), ("bfloat16_operands", torch.bfloat16)])
def test_the_peer_multiplies_in_the_dtype_that_ours_does(dtype, theirs):
    model = seeded_dit(dataclasses.replace(TINY, dtype=dtype))
    x, t, y = np.zeros((2, 8, 8, 4), np.float32), np.array([1, 2]), np.array([3, 4])
    assert diffusers_dit(model, x, t, y)().dtype == theirs


def test_a_peer_that_cannot_compute_where_ours_does_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(InputError, match="PyTorch finds no TPU here: set JAX_PLATFORMS=cpu"):
        device()
