"""The commands as a user types them: what they make, and the one line they say when something is wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import refuses, succeeds
from PIL import Image
from sklearn.datasets import load_sample_images

from dit_jax.files import read_npz

SMALL = [
    "--config.model.hidden_size=16",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
    "--config.batch_size=16",
    "--config.log_every=5",
    "--config.preview.every=0",
    "--config.sample.steps=3",
    "--config.checkpoint.every=10",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of crops of scikit-learn's sample photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for i in range(12):
            crop = Image.fromarray(photo).crop((40 * i, 20 * i, 40 * i + 160, 20 * i + 120))
            crop.save(folder / name / f"{i:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("digits")
    result = succeeds("train", "--config=configs/digits.py", f"--workdir={workdir}", "--config.steps=20", *SMALL)
    assert "trained to step 20" in result.stdout
    return workdir


def test_photographs_from_a_folder_train_and_make_a_grid(tmp_path, photos):
    workdir = tmp_path / "run"
    succeeds(
        "train",
        "--config=configs/folder.py",
        f"--workdir={workdir}",
        f"--config.data.source=folder:{photos}",
        "--config.model.num_classes=2",
        "--config.model.input_size=16",
        "--config.steps=10",
        *SMALL,
    )
    succeeds("sample", f"--weights={workdir}", f"--out={tmp_path / 'grid.png'}", "--labels=0,1", "--count=8")
    assert Image.open(tmp_path / "grid.png").mode == "RGB"


def test_the_same_images_whatever_the_batch_and_the_devices(tmp_path, digits_run):
    images = []
    for name, batch, devices in (("a", 20, 1), ("b", 6, 1), ("c", 20, 8)):
        out = tmp_path / f"{name}.npz"
        args = [f"--weights={digits_run}", f"--out={out}", "--count=20", f"--batch={batch}"]
        succeeds("sample", *args, devices=devices)
        arrays = read_npz(out, ("arr_0", "labels"))
        assert arrays["arr_0"].shape == (20, 8, 8, 1) and arrays["labels"].tolist() == [*range(10), *range(10)]
        images.append(arrays["arr_0"].astype(int))
    for other in images[1:]:
        assert np.abs(other - images[0]).max() <= 1 and (other != images[0]).mean() < 1e-3


def test_raw_weights_draw_other_images_into_a_folder(tmp_path, digits_run):
    for ema in ("true", "false"):
        out = tmp_path / ema
        succeeds("sample", f"--weights={digits_run}", f"--out={out}", f"--ema={ema}", "--labels=3,7", "--seed=5")
    names = sorted(path.name for path in (tmp_path / "true").glob("*.png"))
    assert names == ["000000-3.png", "000001-7.png"]
    assert any((tmp_path / "true" / n).read_bytes() != (tmp_path / "false" / n).read_bytes() for n in names)


def test_a_damaged_newest_checkpoint_is_one_line_and_the_one_before_is_used(tmp_path, digits_run):
    run_folder = tmp_path / "run"
    shutil.copytree(digits_run, run_folder)
    for path in (run_folder / "checkpoints" / "20").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:50])
    result = succeeds("sample", f"--weights={run_folder}", f"--out={tmp_path / 'a.png'}", "--labels=1")
    assert "at step 10" in result.stdout
    assert "checkpoints/20 cannot be read" in result.stderr and "Traceback" not in result.stderr


def test_the_judge_writes_what_it_prints(tmp_path, digits_run):
    succeeds("sample", f"--weights={digits_run}", f"--out={tmp_path / 'a.npz'}", "--count=40")
    result = succeeds("judge", f"--samples={tmp_path / 'a.npz'}", "--data=digits", f"--out={tmp_path / 'j.json'}")
    judgement = json.loads((tmp_path / "j.json").read_text())
    assert f"{judgement['agreement']:.1%} of 40 images" in result.stdout
    assert judgement["classifier_accuracy"] > 0.97


@pytest.mark.parametrize("command", ["train", "sample", "judge"])
def test_help_shows_an_example(command):
    assert f"python -m dit_jax.{command} --" in succeeds(command, "--help").stdout


def test_importing_the_package_imports_what_it_needs_only_when_used():
    late = {"jax", "flax", "optax", "torch", "tensorflow_datasets", "grain", "orbax", "tensorboardX", "PIL", "scipy"}
    script = (
        f"import sys, dit_jax; print(sorted({late} & set(sys.modules)), dit_jax.DiT.__name__, "
        "dit_jax.evaluation.frechet_distance.__name__, 'load_dit' in dir(dit_jax))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.split() == ["[]", "DiT", "frechet_distance", "True"], result.stderr


@pytest.mark.parametrize(
    ("told", "args"),
    [
        ("no config field", ["--config=configs/digits.py", "--config.stepz=3"]),
        ("configs/none.py", ["--config=configs/none.py"]),
        ("does not exist", ["--config=configs/digits.py", "--config.data.source=folder:/nowhere"]),
        ("unexpected argument 'digits'", ["--config=configs/digits.py", "digits"]),
        ("invalid literal", ["--config=configs/digits.py", "--config.steps=many"]),
    ],
)
def test_train_refuses(tmp_path, told, args):
    refuses(told, "train", f"--workdir={tmp_path / 'run'}", *args)
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refuses(
        "cannot write to the folder", "train", "--config=configs/digits.py", f"--workdir={tmp_path / 'file' / 'run'}"
    )


def test_train_refuses_an_empty_class_folder(tmp_path, photos):
    (tmp_path / "data" / "empty").mkdir(parents=True)
    (tmp_path / "data" / "full").symlink_to(photos / "china")
    source = f"--config.data.source=folder:{tmp_path / 'data'}"
    refuses("empty holds no images", "train", "--config=configs/folder.py", f"--workdir={tmp_path / 'run'}", source)


def test_a_truncated_photograph_stops_the_run_or_is_replaced_and_counted(tmp_path, photos):
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for photo in (photos / "china").iterdir():
            (tmp_path / "data" / label / photo.name).write_bytes(photo.read_bytes())
    broken = tmp_path / "data" / "a" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    args = [
        "--config=configs/folder.py",
        f"--config.data.source=folder:{tmp_path / 'data'}",
        "--config.model.num_classes=2",
        "--config.model.input_size=16",
        "--config.steps=6",
        *SMALL,
    ]
    refuses(str(broken), "train", *args, f"--workdir={tmp_path / 'run'}")
    result = succeeds("train", *args, f"--workdir={tmp_path / 'other'}", "--config.data.skip_corrupt=true")
    assert "images could not be read; others took their places" in result.stderr


def test_sample_refuses(tmp_path, digits_run):
    out = f"--out={tmp_path / 'a.png'}"
    refuses("takes numbers of classes, balanced or random", "sample", f"--weights={digits_run}", out, "--labels=0,10")
    refuses("nothing of that name", "sample", "--weights=/nowhere", out)
    refuses("cannot write", "sample", f"--weights={digits_run}", "--out=/proc/none/a.png")
    npz = f"--out={tmp_path / 'a.npz'}"
    refuses("low,high with 0 <= low", "sample", f"--weights={digits_run}", npz, "--guidance_interval=3")
    refuses("'x' is not a number", "sample", f"--weights={digits_run}", npz, "--guidance_interval=0,x")
    assert not list(tmp_path.iterdir())
    refuses("--steps", "sample", f"--weights={digits_run}", out, "--steps=0")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refuses("no checkpoint yet", "sample", f"--weights={tmp_path / 'run'}", out)
    assert not (tmp_path / "a.png").exists()


def test_judge_refuses(tmp_path):
    out = f"--out={tmp_path / 'j.json'}"
    refuses("no file", "judge", f"--samples={tmp_path / 'none.npz'}", "--data=digits", out)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    refuses("lacks the array labels", "judge", f"--samples={tmp_path / 'a.npz'}", "--data=digits", out)
