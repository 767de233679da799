"""Pictures from labels and keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import TINY, seeded_dit
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax import GaussianDiffusion, ddpm_sample, guided
from dit_jax.checkpoints.codec import IDENTITY
from dit_jax.diffusion.samplers import initial_noise
from dit_jax.errors import InputError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.sampling.generate import image_keys, make_generate, make_program, random_labels, to_uint8

PROCESS = {"schedule": "linear", "steps": 1000, "prediction": "epsilon", "variance": "learned_range", "loss": "mse"}
SETTINGS = {"sampler": "ddpm", "steps": 4, "guidance": 2.0, "guidance_channels": 3, "clip_denoised": True}


@pytest.fixture(scope="module")
def params():
    return nnx.to_pure_dict(nnx.state(seeded_dit(TINY), nnx.Param))


@pytest.fixture(scope="module")
def generate():
    return make_generate(TINY, PROCESS, **SETTINGS)


@pytest.fixture(scope="module")
def eight(generate, params):
    return np.asarray(generate(params, np.arange(8, dtype=np.int32), image_keys(0, 0, 8)))


def levels_apart(a, b):
    return np.abs(a.astype(int) - b.astype(int))


def test_it_is_the_sampler_on_the_guided_model(eight):
    y, keys = jnp.arange(8), image_keys(0, 0, 8)
    denoise = guided(seeded_dit(TINY), y, scale=2.0, channels=3)
    diffusion = GaussianDiffusion.create(respacing="4")
    x = ddpm_sample(diffusion, denoise, initial_noise(keys, (8, 8, 4)), keys, clip_denoised=True)
    assert levels_apart(np.asarray(to_uint8(x)), eight).max() <= 1


@pytest.fixture(scope="module")
def hundred(params):
    """A hundred images in batches of 20 from one device."""
    return draw(params, batch=20, devices=1)


def draw(params, batch, devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    labels = np.arange(100, dtype=np.int32) % 10
    with jax.set_mesh(mesh):
        generate = make_generate(TINY, PROCESS, **SETTINGS)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        starts = range(0, 100, batch)
        images = [generate(params, np.resize(labels[i:], batch), image_keys(3, i, batch)) for i in starts]
        return np.concatenate([np.asarray(image) for image in images])[:100]


@pytest.mark.parametrize(("batch", "devices"), [(7, 1), (100, 1), (20, 2), (16, 8)])
def test_an_image_depends_on_its_seed_and_index_only(params, hundred, batch, devices):
    difference = levels_apart(draw(params, batch, devices), hundred)
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-4


def test_weights_are_cast_once_for_all_steps(params):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    program = make_program(config, PROCESS, IDENTITY, **SETTINGS).trace(params, {}, np.arange(2), image_keys(0, 0, 2))
    (steps,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "scan")
    kernel = params["blocks"]["mlp"]["fc1"]["kernel"].shape
    assert {str(value.aval.dtype) for value in steps.invars if value.aval.shape == kernel} == {"bfloat16"}


def test_seeds_and_indices_give_different_images(generate, params, eight):
    same_label = np.zeros(8, np.int32)
    images = np.asarray(generate(params, same_label, image_keys(0, 0, 8)))
    others = np.asarray(generate(params, same_label, image_keys(1, 0, 8)))
    assert len(np.unique(np.concatenate([images, others]).reshape(16, -1), axis=0)) == 16


def test_random_labels_are_uniform_and_depend_on_seed_and_index_only():
    labels = np.asarray(random_labels(0, 5000, 10))
    assert np.array_equal(random_labels(0, 70, 10), labels[:70]) and labels.dtype == np.int32
    assert (random_labels(1, 5000, 10) != labels).mean() > 0.85
    counts = np.bincount(labels, minlength=10)
    assert ((counts - 500.0) ** 2 / 500).sum() < 27.9  # chi-squared of 9 degrees of freedom, one in a thousand


def test_pixels_are_clipped_and_truncated():
    x = jnp.array([-2.0, -1.0, -0.999, 0.0, 0.0039, 0.9999, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 128, 255, 255, 255]


def test_unknown_sampler_is_refused():
    with pytest.raises(InputError, match=r"ddpm, ddim, dpm-solver\+\+"):
        make_generate(TINY, PROCESS, **(SETTINGS | {"sampler": "euler"}))


def test_more_steps_than_the_process_has_are_refused():
    with pytest.raises(InputError, match="1001"):
        make_generate(TINY, PROCESS, **(SETTINGS | {"steps": 1001}))
