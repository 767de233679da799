"""Files and folders on disk: made or refused in one line, and never half-written."""

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dit_jax.errors import InputError


def make_folder(path: str | Path) -> Path:
    """Create a folder, with its parents, unless it is there. Raises InputError if it cannot be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {path}: {error.strerror}; choose another") from error
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
