"""Autoencoders from and to files and folders, and the state dict of diffusers both ways."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Diffusers
from flax import nnx
from goldens.seeded import seeded_array, seeded_weights
from safetensors.torch import save_file

from dit_jax import AutoencoderConfig, AutoencoderKL
from dit_jax.checkpoints.autoencoder_layout import (
    diffusers_config,
    infer,
    load_autoencoder,
    read_autoencoder,
    save_autoencoder,
)
from dit_jax.errors import InputError

SMALL = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
SIXTEEN = AutoencoderConfig(
    in_channels=1,
    out_channels=2,
    block_out_channels=(8, 8, 24),
    layers_per_block=3,
    latent_channels=16,
    norm_num_groups=8,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)


def theirs(config: AutoencoderConfig) -> Diffusers:
    """The real class with weights from `seeded.py`."""
    network = Diffusers.from_config(diffusers_config(config)).eval()
    weights = seeded_weights({name: tuple(a.shape) for name, a in network.state_dict().items()})
    network.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()})
    return network


def arrays(network: Diffusers) -> dict[str, np.ndarray]:
    return {name: a.numpy() for name, a in network.state_dict().items()}


def assert_same(ours: AutoencoderKL, network: Diffusers):
    ours, expected = ours.to_state_dict(), arrays(network)
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)


def spelled_as_in_2022(weights: dict[str, np.ndarray], convolutions: bool) -> dict[str, np.ndarray]:
    old = {}
    for name, array in weights.items():
        for today, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{today}." in name:
                name = name.replace(today, then)
                array = array[:, :, None, None] if convolutions and array.ndim == 2 else array
        old[name] = array
    return old


@pytest.fixture(scope="module")
def small() -> Diffusers:
    return theirs(SMALL)


@pytest.fixture
def weights(small) -> dict[str, np.ndarray]:
    return arrays(small)


@pytest.mark.parametrize("config", [SMALL, SIXTEEN], ids=["small", "sixteen"])
def test_diffusers_takes_our_state_dict_strictly_and_gives_it_back(config):
    network, other = theirs(config), Diffusers.from_config(diffusers_config(config))
    ours = AutoencoderKL.from_state_dict(config, arrays(network))
    other.load_state_dict({name: torch.from_numpy(a) for name, a in ours.to_state_dict().items()}, strict=True)
    assert_same(ours, network)
    assert_same(ours, other)


@pytest.mark.parametrize("convolutions", [False, True])
def test_files_of_2022_are_read(small, convolutions):
    old = spelled_as_in_2022(arrays(small), convolutions)
    assert "encoder.mid_block.attentions.0.query.weight" in old
    assert_same(AutoencoderKL.from_state_dict(SMALL, old), small)


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.pt", "vae.bin", "diffusers:vae"])
@pytest.mark.parametrize("config", [SMALL, SIXTEEN], ids=["small", "sixteen"])
def test_what_we_write_we_read_with_its_config(config, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = theirs(config)
    save_autoencoder(AutoencoderKL.from_state_dict(config, arrays(network)), name)
    back = load_autoencoder(name.removeprefix("diffusers:"))
    assert back.config == config
    assert_same(back, network)


@pytest.mark.parametrize("config", [SMALL, SIXTEEN], ids=["small", "sixteen"])
def test_diffusers_decodes_from_our_folder_as_we_do(config, tmp_path):
    ours = AutoencoderKL.from_state_dict(config, arrays(theirs(config)))
    save_autoencoder(ours, f"diffusers:{tmp_path / 'vae'}")
    network = Diffusers.from_pretrained(tmp_path / "vae")
    assert network.config.scaling_factor == config.scaling_factor
    assert network.config.shift_factor == config.shift_factor
    z = seeded_array("z", (1, 4, 6, config.latent_channels))
    with torch.no_grad():
        image = network.decode(torch.from_numpy(np.moveaxis(z, -1, 1).copy())).sample.numpy()
    assert np.abs(np.moveaxis(image, 1, -1) - jax.jit(ours.decode)(z)).max() < 2e-5 * np.abs(image).max()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("config", [SMALL, SIXTEEN], ids=["small", "sixteen"])
def test_folders_of_diffusers_are_read_alone_and_in_a_pipeline(config, safe, tmp_path):
    network = theirs(config)
    network.save_pretrained(tmp_path / "pipeline" / "vae", safe_serialization=safe)
    file = f"diffusion_pytorch_model.{'safetensors' if safe else 'bin'}"
    for path in ("pipeline", "pipeline/vae", f"pipeline/vae/{file}"):
        ours = load_autoencoder(tmp_path / path)
        assert ours.config == config
        assert_same(ours, network)


def test_an_old_config_json_means_stable_diffusions_scale(small, tmp_path):
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_autoencoder(tmp_path)[0] == SMALL


def test_a_fetched_name_is_found_in_the_hubs_cache(small, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--stabilityai--sd-vae-ft-ema"
    small.save_pretrained(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    assert_same(load_autoencoder("sd-vae-ft-ema"), small)
    with pytest.raises(InputError, match=r"dit_jax\.download sd-vae-ft-mse"):
        load_autoencoder("sd-vae-ft-mse")


@pytest.mark.parametrize("config", [SMALL, SIXTEEN, AutoencoderConfig()], ids=["small", "sixteen", "full"])
def test_names_and_shapes_tell_the_architecture(config):
    with torch.device("meta"):
        network = Diffusers.from_config(diffusers_config(config))
    fields = infer({name: tuple(a.shape) for name, a in network.state_dict().items()})
    known = {name: getattr(config, name) for name in ("norm_num_groups", "scaling_factor", "shift_factor")}
    assert AutoencoderConfig(**(fields | known)) == config


def test_a_strangers_file_is_read_with_what_the_user_knows(small, tmp_path):
    path = tmp_path / "stranger.safetensors"
    save_file(small.state_dict(), path)
    assert load_autoencoder(path).config == dataclasses.replace(SMALL, norm_num_groups=8)
    ours = load_autoencoder(path, norm_num_groups=4, scaling_factor=0.13025)
    assert ours.config == dataclasses.replace(SMALL, scaling_factor=0.13025)
    assert_same(ours, small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_as_float32(small, dtype, tmp_path):
    halves = {name: a.to(dtype) for name, a in small.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    torch.save(halves, tmp_path / "half.pt")
    for name in ("half.safetensors", "half.pt"):
        _, params = read_autoencoder(tmp_path / name)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
        read = nnx.to_pure_dict(nnx.state(load_autoencoder(tmp_path / name)))["quant_conv"]["bias"]
        assert np.array_equal(read, halves["quant_conv.bias"].float().numpy())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("decoder.conv_in.bias"), r"lacks decoder\.conv_in\.bias, which .*\(8, 16\)"),
        (lambda w: w.update({"loss.logvar": np.zeros(1, np.float32)}), r"holds loss\.logvar"),
        (lambda w: w.update({"quant_conv.bias": np.zeros(4)}), r"quant_conv\.bias has shape \(4,\) where \(8,\)"),
        (
            lambda w: w.update({"encoder.mid_block.attentions.0.to_q.weight": np.zeros((16, 16, 3, 3))}),
            r"to_q\.weight has shape \(16, 16, 3, 3\) where \(16, 16\)",
        ),
    ],
    ids=["missing", "extra", "shape", "kernel"],
)
def test_other_tensors_are_refused_by_name(weights, change, told):
    change(weights)
    with pytest.raises(InputError, match=told):
        AutoencoderKL.from_state_dict(SMALL, weights)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "is of a AutoencoderKLWan; expected AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "a AttnDownEncoderBlock2D among down"),
        ({"layers_per_block": 2}, r"model\.safetensors: the state dict lacks"),
        ({"norm_num_groups": 3}, r"model\.safetensors: block_out_channels"),
        ({"block_out_channels": ["wide"]}, r"model\.safetensors: not the fields of an AutoencoderConfig"),
        ({"block_out_channels": "wide"}, r"config\.json has block_out_channels='wide': expected list"),
    ],
)
def test_folders_of_another_network_are_refused(small, fields, told, tmp_path):
    small.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InputError, match=told):
        load_autoencoder(tmp_path)


def test_what_is_no_autoencoder_is_refused(small, tmp_path):
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "dit.safetensors")
    with pytest.raises(InputError, match=r"dit\.safetensors: these are not the weights of an AutoencoderKL"):
        load_autoencoder(tmp_path / "dit.safetensors")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no suffix of weights"):
        load_autoencoder(tmp_path / "notes.txt")
    small.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="neither"):
        load_autoencoder(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(InputError, match=r"config\.json"):
        load_autoencoder(tmp_path)


def test_nothing_is_written_over_a_folder_or_under_another_suffix(weights, tmp_path):
    vae = AutoencoderKL.from_state_dict(SMALL, weights)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "mine").touch()
    with pytest.raises(InputError, match="there already"):
        save_autoencoder(vae, f"diffusers:{tmp_path / 'vae'}")
    with pytest.raises(InputError, match=r"written as \.safetensors"):
        save_autoencoder(vae, tmp_path / "weights")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "vae"]
