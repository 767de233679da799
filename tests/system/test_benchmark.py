"""The benchmark measures what it says, and writes what it prints."""

import json

from commands import refuses, succeeds
from flax import nnx

from dit_jax.checkpoints.autoencoder_layout import save_autoencoder
from dit_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL


def test_the_loader_is_measured_without_an_autoencoder_and_the_json_holds_the_table(tmp_path):
    out = tmp_path / "a" / "speed.json"
    result = succeeds("benchmark", "data", "--config=configs/digits.py", "--repeats=3", f"--json={out}")
    (row,) = json.loads(out.read_text())
    assert row["lowest"] <= row["median"] <= row["highest"] and row["median"] > 100
    assert f"{row['median']:.2f}" in result.stdout and "digits, batches of 64" in result.stdout


def test_the_autoencoder_and_its_peer_are_measured_in_turn(tmp_path):
    out = tmp_path / "speed.json"
    config = AutoencoderConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    save_autoencoder(AutoencoderKL(config, rngs=nnx.Rngs(0)), tmp_path / "a.safetensors")
    succeeds(
        "benchmark",
        "encode",
        f"--autoencoder={tmp_path / 'a.safetensors'}",
        "--peer=diffusers",
        "--image_size=32",
        f"--json={out}",
    )
    names = [row["name"] for row in json.loads(out.read_text())]
    assert names == ["encode, ours", "decode, ours", "encode, diffusers", "decode, diffusers"]


def test_sampling_and_its_peer_are_measured_in_turn(tmp_path):
    small = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    succeeds(
        "benchmark",
        "sample",
        "--config=configs/imagenet256.py",
        *(f"--config.model.{name}={value}" for name, value in small.items()),
        "--config.batch_size=2",
        "--config.sample.steps=3",
        "--peer=diffusers",
        "--repeats=2",
        f"--json={tmp_path / 'speed.json'}",
    )
    rows = json.loads((tmp_path / "speed.json").read_text())
    assert [row["name"] for row in rows] == ["sample, 2 at once, 3 steps", "sample, 2 at once, 3 steps, diffusers"]


def test_samplers_need_weights_and_data():
    refuses("needs --weights and --data", "benchmark", "samplers", "--data=digits")


def test_an_unknown_part_is_refused():
    refuses("expected one of train, sample, forward, data, encode, samplers", "benchmark", "everything")
