"""Drawing from words as typed: train, move to a file, draw, judge; and what is said of prompts that cannot be read."""

import json
import os
import subprocess
import sys

import pytest

from dit_jax.files import read_npz

SMALL = ["--config.model.hidden_size=16", "--config.model.depth=1", "--config.model.num_heads=2"]
SMALL += ["--config.batch_size=16", "--config.preview.every=0", "--config.sample.steps=3", "--config.steps=10"]


def run(command: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"dit_jax.{command}", *map(str, args)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A .safetensors of a run that was told words."""
    folder = tmp_path_factory.mktemp("words")
    result = run("train", "--config=configs/digits_words.py", f"--workdir={folder / 'run'}", *SMALL)
    assert result.returncode == 0, result.stderr
    result = run("convert", folder / "run", folder / "words.safetensors", "--weights=ema")
    assert result.returncode == 0, result.stderr
    return folder / "words.safetensors"


def test_prompts_are_drawn_kept_and_judged(tmp_path, weights):
    out, prompts = tmp_path / "a.npz", ["three", "a five", "my two"]
    result = run("sample", f"--weights={weights}", f"--out={out}", f"--prompts={','.join(prompts)}", "--count=40")
    assert result.returncode == 0, result.stderr
    arrays = read_npz(out, ("labels", "prompts", "settings"))
    assert arrays["prompts"].tolist() == [prompts[i % 3] for i in range(40)]
    assert arrays["labels"].tolist() == [(3, 5, 2)[i % 3] for i in range(40)]
    assert json.loads(str(arrays["settings"]))["prompts"] == "three,a five,my two"
    result = run("judge", f"--samples={out}", "--data=digits", f"--out={tmp_path / 'j.json'}")
    assert result.returncode == 0, result.stderr
    assert set(json.loads((tmp_path / "j.json").read_text())["agreement_by_class"]) == {"2", "3", "5"}


def test_prompts_name_files_and_what_is_no_class_is_drawn_too(tmp_path, weights):
    result = run("sample", f"--weights={weights}", f"--out={tmp_path / 'a'}", "--prompts=a five,nothing")
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "a").glob("*.png")) == ["000000-a-five.png", "000001-nothing.png"]


@pytest.mark.parametrize(
    ("told", "args"),
    [
        ("'Five!' has '!F': expected small letters from a to z, and spaces", ["--prompts=three,Five!"]),
        ("give one of them", ["--prompts=three", "--labels=3"]),
    ],
)
def test_sample_refuses(tmp_path, weights, told, args):
    result = run("sample", f"--weights={weights}", f"--out={tmp_path / 'a.npz'}", *args)
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and line.startswith("error: ") and told in line and not list(tmp_path.iterdir())
