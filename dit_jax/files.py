"""Files and folders on disk: made or refused in one line, and never half-written."""

import hashlib
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from dit_jax.errors import InputError


def make_folder(path: str | Path) -> Path:
    """Create a folder, with its parents, unless it is there. Raises InputError if it cannot be written to."""
    path = Path(path)
    if any(re.fullmatch("[a-z][a-z0-9]*:", part) for part in path.parts):  # gs://bucket/run
        raise InputError(f"{path} is an address, expected a path: mount the bucket, and give the path of the mount")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{_this_process()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path}: {error.strerror}; choose another") from error
    return path


def require_renaming(folder: Path) -> None:
    """Raises InputError if a folder with something in it cannot be renamed there, as on a bucket mounted plainly."""
    probe = folder / f".renaming-{_this_process()}"
    renamed = probe.with_suffix(".done")
    try:
        (probe / "inner").mkdir(parents=True)
        probe.rename(renamed)
    except OSError as error:
        raise InputError(
            f"folders in {folder} cannot be renamed ({error.strerror}), and so no checkpoint can be written: "
            "choose another disk; a bucket needs a hierarchical namespace"
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        shutil.rmtree(renamed, ignore_errors=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{_this_process()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors lets nobody else read what it writes
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises InputError if `path` is there already, unless as an empty folder.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} is there already: remove it, or choose another name")
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{_this_process()}")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file, or for a folder that of the lines `sha256  relative/path` of its files, in order of name."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_json(path: str | Path, **kinds: type | UnionType) -> dict[str, Any]:
    """The object in a JSON file, as `parse_json`. Raises InputError if the file is missing or damaged, too."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return parse_json(content, str(path), **kinds)


def parse_json(text: str | bytes, name: str, **kinds: type | UnionType) -> dict[str, Any]:
    """The object that JSON holds; `name` says where it was found.

    kinds: the types of fields that may be there; one that is null counts as one that is not.
    Raises InputError if it is no JSON object, or a field is of another type.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds a {type(content).__name__}: expected a JSON object")
    for field, kind in kinds.items():
        if content.get(field) is None:
            content.pop(field, None)
        elif not isinstance(content[field], kind):
            raise InputError(f"{name} has {field}={content[field]!r}: expected {getattr(kind, '__name__', kind)}")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, atomic."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_npz(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz. Raises InputError if it is missing, damaged, or lacks one of them."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if lacking := [name for name in names if name not in arrays]:
                raise InputError(f"{path} lacks the array {lacking[0]}; it holds {', '.join(arrays) or 'none'}")
            return {name: arrays[name] for name in names}
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a whole .npz file ({error})") from error


def _this_process() -> str:
    """A name that no other process has, on this host or another that sees the same files."""
    return f"{socket.gethostname()}-{os.getpid()}"
