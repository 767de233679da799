from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit_jax import DiT, DiTConfig
from dit_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL, abstract_autoencoder
from dit_jax.parallel.chips import peak_flops
from dit_jax.training.flops import decoder_macs, encoder_macs, forward_macs, train_flops

GMACS = {  # FACTS: forward pass at 256 pixels
    "DiT-S/2": 6.06,
    "DiT-S/4": 1.41,
    "DiT-S/8": 0.36,
    "DiT-B/2": 23.01,
    "DiT-B/4": 5.57,
    "DiT-B/8": 1.42,
    "DiT-L/2": 80.70,
    "DiT-L/4": 19.70,
    "DiT-L/8": 5.01,
    "DiT-XL/2": 118.62,
    "DiT-XL/4": 29.04,
    "DiT-XL/8": 7.39,
}


@pytest.mark.parametrize(("name", "gmacs"), GMACS.items())
def test_forward_pass_costs_what_the_paper_says(name, gmacs):
    assert forward_macs(DiTConfig.preset(name)) / 1e9 == pytest.approx(gmacs, abs=0.00501)


def test_xl_2_at_512_pixels_and_a_training_step():
    assert forward_macs(DiTConfig.preset("DiT-XL/2", input_size=64)) / 1e9 == pytest.approx(524.54, abs=0.005)
    assert train_flops(DiTConfig.preset("DiT-XL/2")) / 1e9 == pytest.approx(712, abs=0.5)


@pytest.mark.parametrize("heads", [dict(depth=1), dict(depth=2, heads_left=(4, 1))], ids=["even", "uneven"])
def test_the_compiler_counts_the_same_matrix_products(heads):
    config = DiTConfig(input_size=16, patch_size=2, hidden_size=256, num_heads=4, head_dim=64, num_classes=10, **heads)
    model = DiT(config, rngs=nnx.Rngs(0))
    args = jnp.zeros((4, 16, 16, 4)), jnp.zeros(4), jnp.zeros(4, int)
    counted = jax.jit(lambda *args: model(*args)).lower(*args).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(4 * 2 * forward_macs(config), rel=0.05)


AUTOENCODERS = {
    "Stable Diffusion": AutoencoderConfig(),
    "narrow": AutoencoderConfig(block_out_channels=(64, 64, 128), layers_per_block=1, use_quant_conv=False),
    "without attention": AutoencoderConfig(
        block_out_channels=(64, 128), latent_channels=16, mid_block_add_attention=False, use_post_quant_conv=False
    ),
}


@pytest.mark.parametrize("config", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_the_compiler_counts_the_same_products_of_the_autoencoder(config):
    graph, params = abstract_autoencoder(config)

    def counted(function, *shape):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        lowered = jax.jit(lambda params, x: function(nnx.merge(graph, params), x)).lower(params, x)
        return lowered.cost_analysis()["flops"]

    side = 256 // config.downsample
    encoding = counted(AutoencoderKL.moments, 1, 256, 256, 3)
    decoding = counted(AutoencoderKL.decode, 1, side, side, config.latent_channels)
    assert encoding == pytest.approx(2 * encoder_macs(config, 256), rel=0.03)
    assert decoding == pytest.approx(2 * decoder_macs(config, 256), rel=0.03)


PEAKS = {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v5p": 459, "TPU v6 lite": 918}
PEAKS |= {"TPU7x": 1153.5, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA B200": 2250}


@pytest.mark.parametrize(("kind", "teraflops"), PEAKS.items())
def test_the_published_peak_is_the_devices_own(kind, teraflops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == teraflops * 1e12


def test_a_cpu_has_no_published_peak():
    assert peak_flops(jax.devices("cpu")[0]) is None
