"""Weights in and out: bit by bit through every format, with what is known of them, or refused in one line."""

import dataclasses
import itertools
import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints.test_torch_layout import ODD
from goldens.cases import TINY, relative_error, seeded_dit
from reference.dit import twin
from reference.training import Trainer

from dit_jax import DiT, DiTConfig, load_dit, save_dit
from dit_jax.checkpoints.files import open_weights, write_weights
from dit_jax.errors import InputError

FORMATS = {"pt": "weights.pt", "safetensors": "weights.safetensors", "diffusers": "pipeline", "orbax": "arrays"}
UNTOLD = {"num_heads": 8, "class_dropout_prob": 0.25, "downscale_freq_shift": 1, "norm2_eps": 1e-5}  # by shapes
CONFIGS = {"tiny": dataclasses.replace(TINY, **UNTOLD), "odd": ODD}


def destination(folder: Path, kind: str) -> str:
    return ("diffusers:" if kind == "diffusers" else "") + str(folder / FORMATS[kind])


@lru_cache
def awkward_weights(config: DiTConfig) -> dict[str, np.ndarray]:
    """A state dict that holds more than plain numbers."""
    weights = seeded_dit(config).to_state_dict()
    bits = [0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001]  # -0, subnormals, infinities, NaN
    for name in ("blocks.1.mlp.fc2.weight", "blocks.2.attn.qkv.bias", "final_layer.linear.weight"):
        weights[name].reshape(-1)[: len(bits)] = np.array(bits, np.uint32).view(np.float32)
    return weights


def in_bytes(state_dict: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state_dict.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """Folders with a model in every format."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CONFIGS}
    for name, kind in itertools.product(CONFIGS, FORMATS):
        model = DiT.from_state_dict(CONFIGS[name], awkward_weights(CONFIGS[name]))
        save_dit(model, destination(folders[name], kind))
    return folders


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FORMATS, 2)))
@pytest.mark.parametrize("name", CONFIGS)
def test_every_pair_of_formats_keeps_every_bit_and_the_config(tmp_path, written, name, source, target):
    weights = open_weights(written[name] / FORMATS[source])
    write_weights(destination(tmp_path, target), weights.record, weights.leaves)
    model = load_dit(tmp_path / FORMATS[target])
    assert model.config == CONFIGS[name]
    assert in_bytes(model.to_state_dict()) == in_bytes(awkward_weights(CONFIGS[name]))


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_pytorch_loads_our_pt_strictly_as_plain_data_and_computes_the_same(tmp_path, config):
    model = seeded_dit(config)
    save_dit(model, tmp_path / "weights.pt")
    network = twin(config)
    network.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    x = np.random.default_rng(0).standard_normal((3, config.input_size, config.input_size, config.in_channels))
    x, t, y = x.astype(np.float32), np.array([0, 500, 999]), np.array([0, 4, 9])
    with torch.inference_mode():
        theirs = network(torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(t), torch.from_numpy(y)).movedim(1, -1)
    assert relative_error(model(x, t, y), theirs.numpy()) < 2e-5


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> tuple[Path, Trainer]:
    """What the official training would have left after one step."""
    trainer, rng = Trainer(twin(TINY), lr=1e-2, ema_decay=0.5), np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 4, 4, 8, 8), dtype=np.float32)
    trainer.step(x0, np.arange(4), np.array([0, 100, 500, 999]), noise, np.zeros(4, bool))
    path = tmp_path_factory.mktemp("training") / "0000001.pt"
    trainer.save(path)
    return path, trainer


@pytest.mark.parametrize(("asked", "taken"), [(None, "ema"), ("ema", "ema"), ("model", "model")])
def test_the_average_is_taken_from_a_training_checkpoint_unless_the_raw_weights_are_asked_for(training, asked, taken):
    path, trainer = training
    ours = load_dit(path, asked, num_heads=4).to_state_dict()
    theirs, others = (getattr(trainer, name).state_dict() for name in (taken, {"ema": "model", "model": "ema"}[taken]))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert not np.array_equal(ours["final_layer.linear.weight"], others["final_layer.linear.weight"])
    assert open_weights(path, asked, num_heads=4).record.weights == taken


def test_weights_that_are_not_there_are_not_given(tmp_path, written, training):
    flat = written["tiny"] / "weights.pt"
    refuses(r"weights\.pt does not say which weights it holds; 'model' was asked for", flat, "model")
    weights = open_weights(training[0], num_heads=4)
    write_weights(tmp_path / "ema.safetensors", weights.record, weights.leaves)
    assert open_weights(tmp_path / "ema.safetensors", "ema").record.weights == "ema"
    refuses(r"holds 'ema' weights; 'model' was asked for", tmp_path / "ema.safetensors", "model")
    torch.save({"model": torch.load(flat)}, tmp_path / "raw.pt")
    refuses("has no 'ema' weights; it holds model", tmp_path / "raw.pt")
    refuses("expected ema or model", flat, "best")


def test_what_is_given_must_not_contradict_the_file(written, training):
    refuses("has num_heads=8; 4 was given", written["tiny"] / "arrays", num_heads=4)
    refuses("has input_size=8; 16 was given", training[0], num_heads=4, input_size=16)
    refuses("has num_classes=10; 9 was given", training[0], num_heads=4, num_classes=9)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF")
    refuses(r"no suffix of weights: expected \.safetensors, \.pt", tmp_path / "weights.h5")
    refuses("nothing of that name", tmp_path / "nowhere.pt")
    torch.save({"conv.weight": torch.zeros(2, 2, 3, 3)}, tmp_path / "other.pt")
    refuses(r"not the weights of a DiT.*conv\.weight", tmp_path / "other.pt")


@pytest.fixture
def arrays(tmp_path, written) -> Path:
    """A folder of Orbax arrays to be damaged."""
    return shutil.copytree(written["tiny"] / "arrays", tmp_path / "arrays")


def test_flipped_bytes_of_an_array_are_noticed_and_the_array_named(arrays):
    biggest = max((path for path in arrays.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = biggest.read_bytes()
    for place in (len(content) // 3, len(content) // 2):
        biggest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        refuses("blocks/adaLN_modulation/linear/kernel of the weights in .* is not what was written there", arrays)
    biggest.write_bytes(content[:-1000])
    refuses("blocks/adaLN_modulation/linear/kernel of the weights in .* cannot be read", arrays)
    biggest.write_bytes(content)
    load_dit(arrays)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (b'{"model": ', "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"{}", "is not a whole record of weights"),
        (b'{"checksums": {}}', "is not a whole record of weights"),
        (b'{"checksums": {}, "model": 3}', "is not a whole record of weights"),
        (b'{"checksums": []}', "has checksums="),
    ],
)
def test_a_damaged_record_is_named(arrays, damage, told):
    (arrays / "record.json").write_bytes(damage)
    refuses(rf"record\.json {told}", arrays)


@pytest.mark.parametrize(
    "change",
    [
        {"diffusion": []},
        {"diffusion": {"schedule": 3}},
        {"sample": {"steps": "many"}},
        {"sample": {"colour": 3}},
        {"class_names": [1, 2]},
        {"autoencoder": 5},
        {"autoencoder": {"name": "vae"}},
    ],
)
def test_a_record_that_says_what_nobody_wrote_is_refused(arrays, change):
    record = json.loads((arrays / "record.json").read_text())
    (arrays / "record.json").write_text(json.dumps(record | change))
    refuses(r"record\.json is not a whole record of weights", arrays)


@pytest.mark.parametrize("change", [{"input_size": 9}, {"depth": 4}, {"num_classes": 11}, {"hidden_size": "64"}])
def test_a_record_of_another_network_is_refused(arrays, change):
    record = json.loads((arrays / "record.json").read_text())
    record["model"] |= change
    (arrays / "record.json").write_text(json.dumps(record))
    refuses(str(arrays), arrays)


@pytest.mark.parametrize("kind", ["orbax", "diffusers"])
def test_a_folder_that_is_there_is_left_as_it_is(tmp_path, kind):
    (tmp_path / FORMATS[kind]).mkdir()
    (tmp_path / FORMATS[kind] / "mine").write_text("keep")
    with pytest.raises(InputError, match="is there already: remove it, or choose another name"):
        save_dit(seeded_dit(TINY), destination(tmp_path, kind))
    assert [path.name for path in tmp_path.rglob("*")] == [FORMATS[kind], "mine"]


def refuses(told: str, path: Path, weights: str | None = None, **known: int) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_dit(path, weights, **known)
    assert "\n" not in str(caught.value)
