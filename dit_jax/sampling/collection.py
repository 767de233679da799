"""Many pictures on their way to disk: kept as they come, never all in memory, so that a killed run loses few.

A collection is told the pictures of a batch as soon as they are drawn, in order of index. Which pictures lie together
in a part depends on their index alone: a run that goes on from a killed one may have other batches and devices, and
with the same ones it ends with the same bytes.
"""

import json
import math
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dit_jax.errors import InputError
from dit_jax.files import make_folder, read_json, read_npz, replacing, write_json
from dit_jax.sampling.pictures import as_picture, save_grid

PART = 128  # images that are written at once, and lost at most, besides those of the batch
SETTINGS = "settings.json"


class Collection(Protocol):
    """Pictures of the indices 0 to `count - 1`, some of which may be on disk already."""

    goes_on: bool  # whether what a run that was stopped has drawn is there for the next

    def lacks(self, indices: range) -> bool:
        """Whether one of these pictures, counted up to the last there is, has still to be drawn."""

    def add(self, first: int, images: np.ndarray) -> None:
        """Take (B, H, W, C) uint8 pictures, C 1 or 3, of the indices from `first` on; those too many are left out."""

    def complete(self) -> None:
        """Make the result, once all pictures have been added."""


def open_collection(
    path: str | Path,
    labels: np.ndarray,
    class_names: Sequence[str],
    settings: dict[str, Any],
    prompts: Sequence[str] = (),
) -> Collection:
    """The collection of the form that the end of `path` names, with what an interrupted run has left of it.

    `.png`: one captioned grid. `.npz`: an `Archive`. Anything else: a `PictureFolder`.

    labels: (count,), of every picture. settings: all that decides what the pictures are, as JSON has it. prompts: of
    every picture, from a model that draws from words.
    Raises InputError if the place cannot be written to, or was begun with other settings.
    """
    path = Path(path)
    if path.suffix == ".png":
        return Grid(path, prompts or [class_names[label] for label in labels])
    if path.suffix == ".npz":
        return Archive(path, {"labels": labels} | ({"prompts": np.array(prompts)} if prompts else {}), settings)
    return PictureFolder(path, [prompt.replace(" ", "-") for prompt in prompts] or labels, settings)


def check_destination(path: str | Path) -> None:
    """Raise InputError, before the work is done, if `open_collection` could not write there."""
    path = Path(path)
    make_folder(path.parent if path.suffix in (".png", ".npz") else path)


class Archive:
    """An .npz as the ADM suite reads it: `arr_0` (count, H, W, C) uint8; besides it `labels` (count,), `prompts`
    (count,) if there are any, and `settings`, JSON as a 0-d array of text.

    Until it is complete, its parts lie in a folder beside it, `NAME.npz.parts`. The file itself is put together from
    them one at a time, so that memory does not grow with the number of pictures; while that happens, both are on disk.
    """

    goes_on = True

    def __init__(self, path: Path, conditions: dict[str, np.ndarray], settings: dict[str, Any]):
        self.path, self.conditions, self.settings = path, conditions, json.loads(json.dumps(settings))
        self.count = len(conditions["labels"])
        self.folder = path.with_name(f"{path.name}.parts")
        self._pieces: dict[int, list[np.ndarray]] = {}
        self._done = set(range(math.ceil(self.count / PART)))
        if not self._is_complete():
            _begin(self.folder, self.settings, self.folder / SETTINGS)
            self._done = {part for part in self._done if self._is_whole(part)}

    def lacks(self, indices: range) -> bool:
        return any(part not in self._done for part in self._parts(indices))

    def add(self, first: int, images: np.ndarray) -> None:
        indices = range(first, min(first + len(images), self.count))
        for part in self._parts(indices):
            if part not in self._done:
                bounds = self._bounds(part)
                start, stop = max(bounds.start, first), min(bounds.stop, indices.stop)
                self._pieces.setdefault(part, []).append(images[start - first : stop - first])
                if stop == bounds.stop:
                    self._write(part, np.concatenate(self._pieces.pop(part)))

    def complete(self) -> None:
        if not self._is_complete():
            with replacing(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                with archive.open(_entry("arr_0.npy"), "w", force_zip64=True) as entry:
                    self._stream(entry)
                for name, array in (self.conditions | {"settings": np.array(json.dumps(self.settings))}).items():
                    with archive.open(_entry(f"{name}.npy"), "w") as entry:
                        np.lib.format.write_array(entry, array, allow_pickle=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stream(self, entry: Any) -> None:
        for part in sorted(self._done):
            images = np.load(self._file(part))
            if part == 0:
                shape = (self.count, *images.shape[1:])
                np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": shape})
            entry.write(images)

    def _is_complete(self) -> bool:
        try:
            return json.loads(str(read_npz(self.path, ("settings",))["settings"])) == self.settings
        except ValueError:  # it is not there, or another's, which `complete` replaces
            return False

    def _is_whole(self, part: int) -> bool:
        try:
            return len(np.load(self._file(part), mmap_mode="r")) == len(self._bounds(part))
        except (OSError, ValueError):
            return False

    def _write(self, part: int, images: np.ndarray) -> None:
        with replacing(self._file(part)) as temporary:
            np.save(temporary, images)
        self._done.add(part)

    def _parts(self, indices: range) -> range:
        return range(indices.start // PART, math.ceil(min(indices.stop, self.count) / PART))

    def _bounds(self, part: int) -> range:
        return range(part * PART, min((part + 1) * PART, self.count))

    def _file(self, part: int) -> Path:
        return self.folder / f"{part:05d}.npy"


class PictureFolder:
    """A folder with a PNG an image, `000000-3.png`, by index and label or prompt, and `settings.json`.

    A PNG of the settings that is there is whole, and is not drawn again.
    """

    goes_on = True

    def __init__(self, path: Path, names: Sequence[Any], settings: dict[str, Any]):
        self.files = [path / f"{i:06d}-{name}.png" for i, name in enumerate(names)]
        if not (path / SETTINGS).exists() and any(path.glob("*.png")):
            raise InputError(f"{path} holds pictures and no {SETTINGS} that tells which: choose another --out")
        _begin(path, settings, path / SETTINGS)

    def lacks(self, indices: range) -> bool:
        return not all(file.exists() for file in self.files[indices.start : indices.stop])

    def add(self, first: int, images: np.ndarray) -> None:
        for file, image in zip(self.files[first:], images, strict=False):
            with replacing(file) as temporary:
                as_picture(image).save(temporary)

    def complete(self) -> None:
        """Nothing is left to do."""


class Grid:
    """One PNG of few pictures, kept in memory until it is made."""

    goes_on = False

    def __init__(self, path: Path, captions: Sequence[str]):
        self.path, self.captions, self.images = path, captions, []

    def lacks(self, indices: range) -> bool:
        return True

    def add(self, first: int, images: np.ndarray) -> None:
        self.images.append(images)

    def complete(self) -> None:
        save_grid(self.path, np.concatenate(self.images)[: len(self.captions)], self.captions)


def _begin(folder: Path, settings: dict[str, Any], begun: Path) -> None:
    """Write down with what settings a collection begins. Raises InputError if it was begun with others."""
    make_folder(folder)
    if not begun.exists():
        write_json(begun, settings)
    theirs, ours = read_json(begun), json.loads(json.dumps(settings))
    if differing := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        name = differing[0]
        raise InputError(
            f"{folder} was begun with {name}={str(theirs.get(name))[:80]}, now it is {str(ours.get(name))[:80]}: "
            f"choose another --out, the settings as they were, or remove {folder}"
        )


def _entry(name: str) -> zipfile.ZipInfo:
    """Of a fixed date, so that the same pictures are the same file."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
