"""The autoencoder against the original's outputs and the real class of diffusers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Diffusers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flax import nnx
from goldens.cases import TINY_AUTOENCODER, empty_autoencoder, golden, relative_error, seeded_autoencoder
from goldens.seeded import seeded_array, seeded_weights

from dit_jax import AutoencoderConfig, AutoencoderKL
from dit_jax.checkpoints.autoencoder_layout import diffusers_config
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import abstract_autoencoder, from_latents, sample_posterior, to_latents

GOLDENS = {"vae_tiny": TINY_AUTOENCODER, "vae_sd_64": AutoencoderConfig()}

SHAPES = {
    "tiny": TINY_AUTOENCODER,
    "16 channels": AutoencoderConfig(
        block_out_channels=(8, 16, 16),
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "no attention": AutoencoderConfig(
        block_out_channels=(16, 8, 24, 8), layers_per_block=3, norm_num_groups=8, mid_block_add_attention=False
    ),
    "one width": AutoencoderConfig(
        in_channels=1, out_channels=2, block_out_channels=(12,), latent_channels=3, norm_num_groups=3
    ),
    "only one quant_conv": AutoencoderConfig(
        block_out_channels=(8, 8), layers_per_block=2, norm_num_groups=1, use_post_quant_conv=False
    ),
}


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    return seeded_autoencoder(TINY_AUTOENCODER)


@pytest.mark.parametrize("name", GOLDENS)
def test_moments_and_image_are_the_originals(name):
    case, vae = golden(name), seeded_autoencoder(GOLDENS[name])
    # Weights are arguments: as constants, a third of a gigabyte of them would take long to compile and to keep.
    moments = jax.jit(AutoencoderKL.moments)(vae, case["x"])
    assert relative_error(moments, case["moments"]) < 2e-5
    assert relative_error(jax.jit(AutoencoderKL.decode)(vae, case["z"]), case["decoded"]) < 2e-5
    mean = sample_posterior(moments, jnp.zeros(case["mean"].shape))
    deviation = sample_posterior(moments, jnp.ones(case["mean"].shape)) - mean
    assert relative_error(mean, case["mean"]) < 2e-5
    assert relative_error(deviation, case["std"]) < 2e-5


@pytest.mark.parametrize("name", GOLDENS)
def test_state_dict_has_the_originals_names(name):
    assert set(golden(name)["keys"]) == set(empty_autoencoder(GOLDENS[name]).to_state_dict())


def test_a_new_autoencoder_works_and_keeps_the_scale_of_its_input():
    config = dataclasses.replace(TINY_AUTOENCODER, block_out_channels=(8,), mid_block_add_attention=False)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))

    @jax.jit
    def autoencode(x):
        vae = AutoencoderKL(config, rngs=nnx.Rngs(0))
        return vae.decode(sample_posterior(vae.moments(x), jnp.zeros((2, 8, 8, 4))))

    image = autoencode(x)
    assert image.shape == x.shape
    assert 0.1 < image.std() < 10


def test_stable_diffusions_has_its_parameters_and_its_scale():
    config = AutoencoderConfig()
    assert (config.scaling_factor, config.shift_factor) == (0.18215, 0)
    leaves = jax.tree.leaves(abstract_autoencoder(config)[1])
    assert (len(leaves), sum(math.prod(leaf.shape) for leaf in leaves)) == (248, 83_653_863)


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_those_of_diffusers(name):
    config, size = SHAPES[name], (24, 40)
    theirs = Diffusers.from_config(diffusers_config(config)).eval()
    weights = seeded_weights({name: tuple(a.shape) for name, a in theirs.state_dict().items()})
    theirs.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
    ours = AutoencoderKL.from_state_dict(config, weights)
    x = seeded_array("x", (2, *size, config.in_channels))
    z = seeded_array("z", (2, *(side // config.downsample for side in size), config.latent_channels))
    with torch.no_grad():
        moments = theirs.encode(channels_first(x)).latent_dist.parameters
        image = theirs.decode(channels_first(z)).sample
    assert relative_error(jax.jit(ours.moments)(x), channels_last(moments)) < 2e-5
    assert relative_error(jax.jit(ours.decode)(z), channels_last(image)) < 2e-5


def test_a_draw_of_the_posterior_is_diffusers_however_wide_it_is():
    moments = seeded_array("moments", (2, 3, 5, 8)) * 40
    noise = seeded_array("noise", (2, 3, 5, 4))
    posterior = DiagonalGaussianDistribution(channels_first(moments))
    expected = channels_last(posterior.mean) + channels_last(posterior.std) * noise
    assert np.abs(moments[..., 4:]).max() > 30
    assert relative_error(sample_posterior(jnp.asarray(moments), noise), expected) < 1e-6


def test_latents_are_shifted_then_scaled():
    z = seeded_array("z", (2, 4, 4, 4))
    assert np.allclose(to_latents(z, 1.5305, 0.0609), (z - 0.0609) * 1.5305)
    assert np.allclose(from_latents(to_latents(z, 1.5305, 0.0609), 1.5305, 0.0609), z, atol=1e-6)


@pytest.mark.parametrize(("default", "precision"), [("bfloat16", "HIGHEST"), ("high", "HIGH")])
def test_products_are_float32_whatever_the_default_or_of_high_precision_if_that_is(tiny, default, precision):
    x = jnp.zeros((1, 8, 8, 3), jnp.bfloat16)
    with jax.default_matmul_precision(default):
        program = jax.make_jaxpr(lambda x: tiny.decode(jnp.split(tiny.moments(x), 2, axis=-1)[0]))(x)
    products = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(products) > 30
    assert {eqn.outvars[0].aval.dtype for eqn in products} == {jnp.dtype("float32")}
    assert {eqn.params["precision"] for eqn in products} == {(jax.lax.Precision[precision],) * 2}


@pytest.mark.parametrize("shape", [(1, 15, 16, 3), (1, 16, 15, 3), (1, 16, 16, 4), (16, 16, 3)])
def test_an_image_of_another_shape_is_refused(tiny, shape):
    with pytest.raises(InputError, match=r"expects \(batch, height, width, 3\), height and width multiples of 2"):
        tiny.moments(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (8, 8, 4)])
def test_latents_of_another_shape_are_refused(tiny, shape):
    with pytest.raises(InputError, match=r"expects \(batch, height, width, 4\)"):
        tiny.decode(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"block_out_channels": (32, 60)}, r"\(32, 60\): expected multiples of norm_num_groups=8"),
        ({"block_out_channels": ()}, "expected multiples"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"scaling_factor": 0.0}, "scaling_factor=0"),
    ],
)
def test_impossible_configurations_are_refused(fields, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(TINY_AUTOENCODER, **fields)


def test_two_autoencoders_of_one_config_share_a_compilation():
    lists = dataclasses.replace(TINY_AUTOENCODER, block_out_channels=[32, 64])
    first, second = abstract_autoencoder(TINY_AUTOENCODER)[0], abstract_autoencoder(lists)[0]
    assert first == second and hash(first) == hash(second)
    assert (TINY_AUTOENCODER.downsample, AutoencoderConfig().downsample) == (2, 8)
