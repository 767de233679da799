"""Files of named tensors: PyTorch's pickles, read as data and never as code, and safetensors."""

import argparse
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.errors import InputError
from dit_jax.files import parse_json, replacing

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"

RECORD = "dit_jax"
"""Under this name the metadata of a file that we wrote holds what is known of the weights, as JSON."""


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a flat state dict, in a .safetensors file or a pickle, and the record that we left there, or {}.

    Raises InputError if the file is not whole, not one of tensors, or a pickle of anything but plain data.
    """
    return _read_safetensors(path) if path.suffix == SAFETENSORS else from_torch(read_pickle(path), path)


def read_pickle(path: Path, device: str = "cpu") -> Any:
    """What `torch.save` put into a file; of classes only tensors and argparse.Namespace are let in.

    On the device "meta" tensors have shapes but no values, which are not read.

    Raises InputError if it holds anything else (none of which is run), or is not whole.
    """
    torch = import_torch(f"reading {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except Exception as error:  # a damaged file may end in any of a dozen
        if named := re.search(r"global:? (?:GLOBAL )?([\w.]+\.\w+)", str(error), re.IGNORECASE):
            raise InputError(
                f"{path} would run {named[1]} when loaded: refused, and nothing of it was run; expected tensors only"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise InputError(f"{path} is not a pickle of tensors: refused, and nothing of it was run") from error
        raise InputError(f"{path} is not a whole file of PyTorch tensors ({_summary(error)})") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], record: dict) -> None:
    """Write float32 arrays as a flat state dict or a .safetensors file, with `record` in its metadata."""
    text = json.dumps(record)
    if path.suffix == SAFETENSORS:
        from safetensors.numpy import save_file

        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata={"format": "pt", RECORD: text})
        return
    state_dict = to_torch(tensors)
    # Every state dict has such an attribute; `load_state_dict` looks up names of modules in it and nothing else.
    state_dict._metadata = OrderedDict({"": {"version": 1}, RECORD: {"json": text}})
    write_pickle(path, state_dict)


def write_pickle(path: Path, content: Any) -> None:
    """`torch.save`, atomic."""
    torch = import_torch(f"writing {path}")
    with replacing(path) as temporary:
        torch.save(content, temporary)


def to_torch(tensors: Mapping[str, np.ndarray]) -> OrderedDict:
    """PyTorch tensors that share the arrays' memory."""
    torch = import_torch("making PyTorch tensors")
    return OrderedDict((name, torch.from_numpy(array)) for name, array in tensors.items())


def from_torch(state_dict: Any, path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Float32 arrays, which share the memory of tensors that are so too, and the record that we left there, or {}.

    Raises InputError if it is not a mapping of names to tensors; `path` says where it was found.
    """
    torch = import_torch(f"reading {path}")
    if not isinstance(state_dict, dict) or not state_dict:
        raise InputError(f"{path} holds a {type(state_dict).__name__}; expected a state dict of named tensors")
    if odd := [k for k, v in state_dict.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]:
        raise InputError(f"{path} holds {odd[0]!r}, which is not a named tensor; expected a flat state dict")
    tensors = {name: value.detach().float().numpy() for name, value in state_dict.items()}
    return tensors, _record(getattr(state_dict, "_metadata", {}).get(RECORD, {}).get("json"), path)


def check_shapes(kind: str, expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    """Raise InputError, naming the tensors, unless names and shapes are those of `kind`, said for people."""
    if missing := [name for name in expected if name not in found]:
        raise InputError(f"the state dict lacks {_some(missing)}, which {kind} has")
    if extra := sorted(found.keys() - expected.keys()):
        raise InputError(f"the state dict holds {_some(extra)}, which {kind} does not have")
    if wrong := [name for name in expected if found[name] != expected[name]]:
        raise InputError(
            f"the state dict is not of {kind}: {_some(wrong)} has shape {found[wrong[0]]} where "
            f"{expected[wrong[0]]} is expected"
        )


def import_torch(purpose: str) -> Any:
    """The torch module. Raises InputError, with what it is for, if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{purpose} needs PyTorch: pip install torch") from error
    return torch


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np", backend="pread") as file:  # mmap would hold the file in memory a second time
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, _record((file.metadata() or {}).get(RECORD), path)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except AttributeError as error:  # of NumPy, which has no float8
        raise InputError(f"{path} holds numbers of a type that is not read ({_summary(error)})") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole .safetensors file ({_summary(error)})") from error


def _record(text: str | None, path: Path) -> dict:
    return parse_json(text or "{}", f"the metadata {RECORD!r} of {path}")


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _summary(error: Exception) -> str:
    return f"{type(error).__name__} {error}".split("\n")[0].split(". ")[0].strip()
