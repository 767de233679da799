"""Drawing from words as typed: train, move to a file, draw, judge; and what is said of prompts that cannot be read."""

import json

import pytest
from commands import refuses, succeeds

from dit_jax.files import read_npz

SMALL = ["--config.model.hidden_size=16", "--config.model.depth=1", "--config.model.num_heads=2"]
SMALL += ["--config.batch_size=16", "--config.preview.every=0", "--config.sample.steps=3", "--config.steps=10"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A .safetensors of a run that was told words."""
    folder = tmp_path_factory.mktemp("words")
    succeeds("train", "--config=configs/digits_words.py", f"--workdir={folder / 'run'}", *SMALL)
    succeeds("convert", folder / "run", folder / "words.safetensors", "--weights=ema")
    return folder / "words.safetensors"


def test_prompts_are_drawn_kept_and_judged(tmp_path, weights):
    out, prompts = tmp_path / "a.npz", ["three", "a five", "my two"]
    succeeds("sample", f"--weights={weights}", f"--out={out}", f"--prompts={','.join(prompts)}", "--count=40")
    arrays = read_npz(out, ("labels", "prompts", "settings"))
    assert arrays["prompts"].tolist() == [prompts[i % 3] for i in range(40)]
    assert arrays["labels"].tolist() == [(3, 5, 2)[i % 3] for i in range(40)]
    assert json.loads(str(arrays["settings"]))["prompts"] == "three,a five,my two"
    succeeds("judge", f"--samples={out}", "--data=digits", f"--out={tmp_path / 'j.json'}")
    assert set(json.loads((tmp_path / "j.json").read_text())["agreement_by_class"]) == {"2", "3", "5"}


def test_prompts_name_files_and_what_is_no_class_is_drawn_too(tmp_path, weights):
    succeeds("sample", f"--weights={weights}", f"--out={tmp_path / 'a'}", "--prompts=a five,nothing")
    assert sorted(p.name for p in (tmp_path / "a").glob("*.png")) == ["000000-a-five.png", "000001-nothing.png"]


@pytest.mark.parametrize(
    ("told", "args"),
    [
        ("'Five!' has '!F': expected small letters from a to z, and spaces", ["--prompts=three,Five!"]),
        ("give one of them", ["--prompts=three", "--labels=3"]),
    ],
)
def test_sample_refuses(tmp_path, weights, told, args):
    refuses(told, "sample", f"--weights={weights}", f"--out={tmp_path / 'a.npz'}", *args)
    assert not list(tmp_path.iterdir())
