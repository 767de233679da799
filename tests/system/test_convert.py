"""The convert command: what it writes and keeps, what it refuses without a trace, and how much memory it takes."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refuses, succeeds
from goldens.cases import DIT_CASES, TINY, seeded_dit
from reference.dit import twin
from reference.training import Trainer
from safetensors import safe_open

from dit_jax import DiTConfig, __version__, save_dit
from dit_jax.checkpoints.torch_layout import positions
from dit_jax.files import digest, read_npz

A_QUARTER_OF_XL = dataclasses.replace(DiTConfig.preset("DiT-XL/2"), depth=7)
PEAK_OF_WEIGHTS = 1.4  # beside what any conversion takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A training checkpoint, its averaged weights as .safetensors, and what becomes of those."""
    folder = tmp_path_factory.mktemp("weights")
    Trainer(twin(TINY)).save(folder / "0000007.pt")
    succeeds("convert", folder / "0000007.pt", folder / "weights.safetensors", "--num_heads=4")
    with ThreadPoolExecutor(2) as pool:
        made = [folder / "weights.pt", folder / "arrays", f"diffusers:{folder / 'pipeline'}"]
        list(pool.map(lambda path: succeeds("convert", folder / "weights.safetensors", path), made))
    return folder


def record_in(path: Path) -> dict:
    """Read without us."""
    if path.suffix == ".pt":
        return json.loads(torch.load(path, weights_only=True)._metadata["dit_jax"]["json"])
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return json.loads(file.metadata()["dit_jax"])
    return json.loads((path / "record.json").read_text())


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("0000007.pt", "weights.safetensors"),
        ("weights.safetensors", "weights.pt"),
        ("weights.safetensors", "arrays"),
        ("weights.safetensors", "pipeline/transformer/diffusion_pytorch_model.safetensors"),
    ],
)
def test_every_format_says_where_the_weights_come_from(folder, source, made):
    record = record_in(folder / made)
    assert record["source"] == source
    assert record["sha256"] == hashlib.sha256((folder / source).read_bytes()).hexdigest()
    assert record["weights"] == "ema" and record["dit_jax"] == __version__
    assert record["model"] == json.loads(json.dumps(dataclasses.asdict(TINY)))


def test_a_folder_is_known_by_the_digest_of_its_arrays(folder, tmp_path):
    result = succeeds("convert", folder / "arrays", tmp_path / "again.pt")
    record = record_in(tmp_path / "again.pt")
    assert record["source"] == "arrays" and record["sha256"] == digest(folder / "arrays" / "weights")
    assert record["sha256"] in result.stdout
    ours, theirs = (torch.load(path, weights_only=True) for path in (folder / "weights.pt", tmp_path / "again.pt"))
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_autoencoder_that_a_file_has_no_room_for_is_mentioned(folder, tmp_path):
    shutil.copytree(folder / "pipeline", tmp_path / "pipeline")
    (tmp_path / "pipeline" / "vae").mkdir()
    result = succeeds("convert", tmp_path / "pipeline", tmp_path / "weights.safetensors")
    assert f"left behind, since the file has no room for it: the autoencoder {tmp_path}/pipeline/vae" in result.stdout


class Hostile:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("made", ["weights.safetensors", "arrays"])
def test_a_hostile_checkpoint_is_refused_without_a_trace(tmp_path, made):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    content = {"model": {}, "ema": {}, "opt": {}, "args": Hostile(tmp_path / "out" / "it-ran")}
    torch.save(content, tmp_path / "in" / "hostile.pt")
    refuses("would run posix.system when loaded", "convert", tmp_path / "in" / "hostile.pt", tmp_path / "out" / made)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("made", ["arrays", "weights.safetensors"])
def test_damage_that_shows_halfway_leaves_nothing_behind(folder, tmp_path, made):
    arrays = shutil.copytree(folder / "arrays", tmp_path / "in" / "arrays")
    (tmp_path / "out").mkdir()
    record = json.loads((arrays / "record.json").read_text())
    record["checksums"]["x_embedder/proj/bias"] += 1  # of the smallest, which comes last
    (arrays / "record.json").write_text(json.dumps(record))
    refuses("x_embedder/proj/bias of the weights in", "convert", arrays, tmp_path / "out" / made)
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_done_is_one_line(folder, tmp_path):
    made = tmp_path / "weights.safetensors"
    refuses("pass --num_heads", "convert", folder / "0000007.pt", made, "--weights=model")
    refuses("is there already", "convert", folder / "weights.safetensors", folder / "arrays")
    refuses("cannot write to the folder", "convert", folder / "weights.safetensors", folder / "0000007.pt" / "arrays")
    assert not made.exists()


def test_the_arguments_are_explained():
    lines = succeeds("convert", "--help").stdout.splitlines()
    for example in ("weights/xl", "mine.safetensors --weights=ema", "diffusers:pipeline", "runs/moved"):
        assert any("python -m dit_jax.convert" in line and example in line for line in lines)
    refuses("DESTINATION is missing; see --help", "convert", "weights.pt")
    refuses("SOURCE is missing; see --help", "convert")


@pytest.mark.parametrize("made", ["weights.pt", "arrays"])
def test_pictures_are_drawn_from_converted_weights(tmp_path, made):
    model = seeded_dit(DIT_CASES["dit_tiny_rgb_fixed_sigma"])
    save_dit(model, tmp_path / made)
    args = [f"--weights={tmp_path / made}", f"--out={tmp_path / 'pictures.npz'}", "--steps=3", "--labels=1,2,3"]
    succeeds("sample", *args)
    pictures = read_npz(tmp_path / "pictures.npz", ["arr_0", "labels"])
    assert pictures["arr_0"].shape == (3, 16, 16, 3) and pictures["labels"].tolist() == [1, 2, 3]


def test_much_keeps_every_bit_on_its_way_through_all_formats_within_memory(folder, tmp_path):
    """.pt -> Orbax -> diffusers -> .safetensors -> .pt"""
    weights = dict(much())
    size = sum(tensor.nbytes for tensor in weights.values())
    torch.save(weights, tmp_path / "first.pt")
    names = ["first.pt", "arrays", "pipeline", "weights.safetensors", "last.pt"]
    least = peak_memory("convert", folder / "weights.pt", tmp_path / "little.safetensors")
    peaks = {}
    for source, made in pairwise(names):
        destination = f"diffusers:{tmp_path / made}" if made == "pipeline" else tmp_path / made
        peak = peak_memory("convert", tmp_path / source, destination, "--num_heads=16")
        peaks[f"{source} to {made}"] = (peak - least) / size
        shutil.rmtree(tmp_path / source) if (tmp_path / source).is_dir() else (tmp_path / source).unlink()
    last = torch.load(tmp_path / "last.pt", weights_only=True, mmap=True)
    assert list(last) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(tensor.view(torch.int32), last[name].view(torch.int32)), name
    told = ", ".join(f"{conversion} {peak:.2f}" for conversion, peak in peaks.items())
    print(f"\npeak memory in sizes of the weights ({size / 1e9:.2f} GB), beside {least / 1e9:.2f} GB: {told}")
    assert max(peaks.values()) <= PEAK_OF_WEIGHTS, told


def much() -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, each another piece of the same draws, so that all of them take little memory."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in twin(A_QUARTER_OF_XL).state_dict().items()}
    draws = np.tile(
        np.random.default_rng(0).standard_normal(max(map(torch.Size.numel, shapes.values())), np.float32), 2
    )
    for i, (name, shape) in enumerate(shapes.items()):
        start = 20_011 * i
        values = positions(A_QUARTER_OF_XL) if name == "pos_embed" else draws[start : start + shape.numel()]
        yield name, torch.from_numpy(values).view(shape)


def test_accelerators_are_left_to_those_who_compute(folder, tmp_path):
    command = [sys.executable, "-m", "dit_jax.convert", folder / "arrays", tmp_path / "weights.pt"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "tpu"}, timeout=300)
    assert torch.load(tmp_path / "weights.pt", weights_only=True)


def peak_memory(command: str, *args: str | Path) -> int:
    """Of the command, in bytes. A small process in between: what this one has taken would count as its child's."""
    script = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", script, sys.executable, "-m", f"dit_jax.{command}", *map(str, args)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)
