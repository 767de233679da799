"""Files of tensors: hostile and damaged ones are refused in one line, what is written is plain data."""

import os
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from goldens.cases import TINY, seeded_dit

from dit_jax import load_dit
from dit_jax.checkpoints.tensor_files import read_tensors, write_tensors
from dit_jax.errors import InputError

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.full(3, -0.0, np.float32)}


class Hostile:
    """Its pickle runs a command in whoever loads it as pickles are loaded."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


HIDING_PLACES = {
    "top level": lambda hostile: hostile,
    "among tensors": lambda hostile: {"weight": torch.zeros(2), "other": hostile},
    "args": lambda hostile: {"model": {}, "ema": {}, "opt": {}, "args": Namespace(lr=1e-4, data_path=hostile)},
    "tensor name": lambda hostile: {"model": {hostile: torch.zeros(2)}},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("place", HIDING_PLACES)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, suffix, place, zipped):
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "it-ran"
    torch.save(HIDING_PLACES[place](Hostile(f"touch {trace}")), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"would run posix\.system when loaded: refused"):
        load_dit(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so it was dangerous


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_not_run(tmp_path, protocol):
    path, trace = tmp_path / "weights.pt", tmp_path / "it-ran"
    path.write_bytes(pickle.dumps(Hostile(f"touch {trace}"), protocol))
    refuses(path, "refused")
    assert not trace.exists()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGED = {
    "half.pt": half,
    "half.safetensors": half,
    "header only.safetensors": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "text.pt": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20),
    "text.safetensors": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20),
    "empty.pt": lambda path: path.write_bytes(b""),
    "empty.safetensors": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, name):
    path = tmp_path / name
    write_tensors(path, TENSORS, {})
    DAMAGED[name](path)
    refuses(path, "not a (whole|pickle)")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (torch.nn.Linear(2, 2), r"would run torch\.nn\.modules\.linear\.Linear when loaded: refused"),
        ([torch.zeros(2)], "holds a list; expected a state dict"),
        (torch.zeros(2), "holds a Tensor; expected a state dict"),
        ({}, "expected a state dict"),
        ({"state_dict": {"weight": torch.zeros(2)}}, "holds 'state_dict', which is not a named tensor"),
        ({0: torch.zeros(2)}, "holds 0, which is not a named tensor"),
    ],
    ids=["module", "list", "tensor", "nothing", "nested", "numbered"],
)
def test_a_pickle_of_something_else_is_one_line(tmp_path, content, told):
    torch.save(content, tmp_path / "weights.pt")
    refuses(tmp_path / "weights.pt", told)


@pytest.mark.parametrize(("record", "told"), [("{", "is not JSON"), ("[]", "holds a list: expected a JSON object")])
def test_metadata_that_we_did_not_write_is_one_line(tmp_path, record, told):
    tensors = {name: torch.from_numpy(array) for name, array in TENSORS.items()}
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors", metadata={"dit_jax": record})
    refuses(tmp_path / "weights.safetensors", f"metadata 'dit_jax' of .* {told}")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_as_float32_exactly(tmp_path, suffix, dtype):
    path = tmp_path / f"weights{suffix}"
    state_dict = {name: torch.from_numpy(array) for name, array in seeded_dit(TINY).to_state_dict().items()}
    halves = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    torch.save(halves, path) if suffix == ".pt" else safetensors.torch.save_file(halves, path)
    ours = load_dit(path, num_heads=4).to_state_dict()
    for name in ours.keys() - {"pos_embed"}:
        assert ours[name].dtype == np.float32 and np.array_equal(ours[name], halves[name].float().numpy()), name
    assert np.array_equal(ours["pos_embed"], state_dict["pos_embed"])  # computed, not rounded


def test_float8_is_read_or_refused_in_one_line(tmp_path):
    tensors = {"weight": torch.arange(8.0).to(torch.float8_e4m3fn)}
    torch.save(tensors, tmp_path / "weights.pt")
    assert read_tensors(tmp_path / "weights.pt")[0]["weight"].tolist() == list(range(8))
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    refuses(tmp_path / "weights.safetensors", "a type that is not read")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tensors_and_their_record_come_back(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    write_tensors(path, TENSORS, {"source": "über.pt"})
    tensors, record = read_tensors(path)
    assert {name: array.tobytes() for name, array in tensors.items()} == {n: a.tobytes() for n, a in TENSORS.items()}
    assert record == {"source": "über.pt"}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002], ids=oct)
def test_the_umask_says_who_may_read_what_is_written(tmp_path, suffix, umask):
    path, before = tmp_path / f"weights{suffix}", os.umask(umask)
    try:
        write_tensors(path, TENSORS, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def refuses(path: Path, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_dit(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
