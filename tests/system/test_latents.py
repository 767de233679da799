"""Photographs to latents to a trained model to pictures, by commands; killed, restarted, and shared by processes."""

import json
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import Command, refuses, succeeds
from flax import nnx
from goldens.seeded import seeded_array
from PIL import Image
from sklearn.datasets import load_sample_images

from dit_jax import AutoencoderConfig
from dit_jax.checkpoints.autoencoder_layout import save_autoencoder
from dit_jax.files import read_npz
from dit_jax.models.autoencoder import abstract_autoencoder

PHOTOS = 96
ENCODE = "system.encode_in_small_shards"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_seeded(path: Path, seed: str) -> None:
    config = AutoencoderConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)
    graph, shapes = abstract_autoencoder(config)
    fill = lambda at, leaf: seeded_array(seed + jax.tree_util.keystr(at), leaf.shape, leaf.size**-0.25)  # noqa: E731
    save_autoencoder(nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, shapes)), path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """The arguments that name two classes of crops of scikit-learn's photographs, and an autoencoder."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(PHOTOS // 2):
            crop = Image.fromarray(photo).crop((10 * i, 6 * i, 10 * i + 64, 6 * i + 48))
            crop.save(folder / "photos" / name / f"{i:02d}.jpg")
    save_seeded(folder / "autoencoder.safetensors", "a")
    photos, autoencoder = folder / "photos", folder / "autoencoder.safetensors"
    return [f"--data=folder:{photos}", f"--autoencoder={autoencoder}", "--image_size=32", "--batch=2"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, inputs) -> dict[str, bytes]:
    """The files of a data set of 48 shards that was made in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "latents"
    succeeds(ENCODE, *inputs, f"--out={out}")
    files = contents(out)
    assert len([name for name in files if name.startswith("latents-train")]) == PHOTOS // 2
    return files


def test_a_data_set_killed_five_times_has_the_bytes_of_an_unbroken_one(tmp_path, inputs, unbroken):
    out = tmp_path / "latents"
    done = lambda: len(list((out / "done").glob("0*.json")))  # noqa: E731
    for _ in range(5):
        wanted = done() + random.randrange(4)
        process = Command(ENCODE, *inputs, f"--out={out}")
        while process.status is None and (done() < wanted or not out.exists()):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        assert process.status == -signal.SIGKILL, process.stderr
    assert not (out / "metadata.json").exists()
    succeeds(ENCODE, *inputs, f"--out={out}")
    assert contents(out) == unbroken


def test_two_processes_make_the_bytes_of_one(tmp_path, inputs, unbroken):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{probe.getsockname()[1]}"
    args = [*inputs, f"--out={tmp_path / 'latents'}", coordinator, "--num_processes=2"]
    processes = [Command(ENCODE, *args, f"--process_id={index}") for index in (0, 1)]
    try:
        assert [process.wait() for process in processes] == [0, 0], [process.stderr for process in processes]
    finally:
        for process in processes:
            process.kill()
    first, second = [process.stdout for process in processes]
    assert first.count(f"{PHOTOS // 2} images at ") == 2 and "images" not in second
    assert contents(tmp_path / "latents") == unbroken


@pytest.fixture(scope="module")
def trained(tmp_path_factory, inputs) -> Path:
    """A folder with an autoencoder, latents and a run, all made by commands."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(inputs[1].removeprefix("--autoencoder="), folder / "autoencoder.safetensors")
    told = succeeds(
        "encode",
        inputs[0],
        f"--autoencoder={folder / 'autoencoder.safetensors'}",
        f"--out={folder / 'latents'}",
        "--image_size=16",
    ).stdout
    assert f"{PHOTOS} images at " in told
    assert f"is complete: {PHOTOS} records in 1 shards, every checksum right" in told
    settings = dict(input_size=8, in_channels=4, num_classes=2, hidden_size=16, depth=1, num_heads=2)
    succeeds(
        "train",
        "--config=configs/latents_tiny.py",
        f"--workdir={folder / 'run'}",
        f"--config.data.source=latents:{folder / 'latents'}",
        *(f"--config.model.{name}={value}" for name, value in settings.items()),
        "--config.steps=4",
        "--config.preview.every=0",
        "--config.sample.steps=3",
    )
    return folder


def sample(folder: Path, out: str, *args: str) -> list[str]:
    return ["sample", f"--weights={folder / 'run'}", f"--out={folder / out}", *args]


@pytest.fixture(scope="module")
def pictures(trained) -> np.ndarray:
    """Four pictures, of each class in turn, decoded without a word about the autoencoder."""
    succeeds(*sample(trained, "found.npz", "--count=4"))
    arrays = read_npz(trained / "found.npz", ("arr_0", "labels"))
    assert arrays["labels"].tolist() == [0, 1, 0, 1]
    return arrays["arr_0"]


def test_pictures_are_pixels_of_the_autoencoder_that_the_run_was_trained_with(trained, pictures):
    assert pictures.shape == (4, 16, 16, 3) and pictures.dtype == np.uint8 and pictures.std() > 5
    succeeds(*sample(trained, "grid.png", "--count=4"))
    assert Image.open(trained / "grid.png").mode == "RGB"


def test_a_moved_autoencoder_is_told_and_can_be_given(trained, pictures):
    there, moved = trained / "autoencoder.safetensors", trained / "moved.safetensors"
    there.rename(moved)
    try:
        assert "say --autoencoder" in refuses(str(there), *sample(trained, "none.npz"))
        succeeds(*sample(trained, "given.npz", "--count=4", f"--autoencoder={moved}"))
        save_seeded(there, "b")
        assert "say --autoencoder" in refuses(f"{there} is not the autoencoder", *sample(trained, "none.npz"))
    finally:
        moved.replace(there)
    np.testing.assert_array_equal(read_npz(trained / "given.npz", ("arr_0",))["arr_0"], pictures)
    assert not (trained / "none.npz").exists()


def test_pictures_of_another_dtype_of_products_are_almost_the_same_and_say_so(trained, pictures):
    succeeds(*sample(trained, "mixed.npz", "--count=4", "--dtype=bfloat16_operands"))
    mixed = read_npz(trained / "mixed.npz", ("arr_0", "settings"))
    assert np.abs(mixed["arr_0"].astype(int) - pictures).mean() < 3
    assert json.loads(str(mixed["settings"]))["dtype"] == "bfloat16_operands"
    refuses("dtype='float16': expected auto, float32, ", *sample(trained, "none.npz", "--dtype=float16"))


def test_encode_refuses(tmp_path, inputs, trained):
    again = [inputs[0], f"--autoencoder={trained / 'autoencoder.safetensors'}", f"--out={trained / 'latents'}"]
    refuses("begun with image_size=16, now it is 32", "encode", *again, "--image_size=32")
    out = f"--out={tmp_path / 'latents'}"
    refuses("expected all three", "encode", *inputs, out, "--coordinator=127.0.0.1:1")
    refuses("multiples of 2", "encode", *inputs[:2], out, "--image_size=15")
    assert not (tmp_path / "latents").exists()


def test_a_complete_data_set_is_verified_and_left_as_it_is(inputs, trained):
    before = contents(trained / "latents")
    args = [inputs[0], f"--autoencoder={trained / 'autoencoder.safetensors'}", f"--out={trained / 'latents'}"]
    assert "every checksum right" in succeeds("encode", *args, "--image_size=16").stdout
    assert contents(trained / "latents") == before


def test_help_shows_examples():
    assert succeeds("encode", "--help").stdout.count("python -m dit_jax.encode --data=") >= 2
