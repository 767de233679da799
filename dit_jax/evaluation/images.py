"""Sets of pictures to evaluate: an .npz, a folder, or a data source; read a part at a time."""

import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dit_jax.data.latents import LatentSource
from dit_jax.data.sources import IMAGE_SUFFIXES, Source, decode_image
from dit_jax.data.transforms import to_pixels
from dit_jax.errors import InputError
from dit_jax.files import digest, parse_json, read_json, read_npz

SETTINGS = "settings"  # what dit_jax.sample and --make_reference write beside the pictures, as JSON
FEWEST = 4  # images that have a third neighbour
THREADS = 8  # that read and decode


class ReadImages:
    """Pictures that are read when they are asked for; sliced like an array."""

    def __init__(self, read: Callable[[int], np.ndarray], count: int, size: tuple[int, ...]):
        self.read, self.shape = read, (count, *size)
        self.threads = ThreadPoolExecutor(THREADS)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """(n, H, W, C) uint8."""
        return np.stack(list(self.threads.map(self.read, range(*rows.indices(len(self))))))


class Pictures(NamedTuple):
    """A set of pictures, and where it comes from."""

    images: np.ndarray | ReadImages
    """(N, H, W, C) uint8."""
    path: str
    sha256: str
    settings: dict[str, Any]
    """What is recorded beside them."""

    def about(self) -> dict[str, Any]:
        """For the report."""
        count, *size = self.images.shape
        return {
            "path": self.path,
            "sha256": self.sha256,
            "count": count,
            "size": size,
            "settings": self.settings,
        }


def open_pictures(path: str | Path) -> Pictures:
    """The pictures in an .npz (`arr_0`, uint8, channels last) or anywhere below a folder.

    Arrays that are not compressed stay on disk. Raises InputError if there is no such thing, it is damaged, or what it
    holds is not at least `FEWEST` uint8 pictures; pictures of a folder that differ in size or colour raise it when
    they are read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES
            and not any(p.startswith(".") for p in file.relative_to(path).parts)
        )
        beside = path / f"{SETTINGS}.json"
        images = _folder_images(path, files)
        return Pictures(images, str(path), digest(path), read_json(beside) if beside.is_file() else {})
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if path.suffix != ".npz":
        raise InputError(f"{path} is no set of pictures: expected an .npz or a folder")
    images = open_array(path, "arr_0")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(
            f"{path} holds arr_0 of shape {images.shape}, {images.dtype}: expected (N, height, width, 1 or 3) uint8"
        )
    require_enough(len(images), path)
    return Pictures(images, str(path), digest(path), recorded_settings(path))


def source_images(source: Source, size: int, indices: Sequence[int]) -> ReadImages:
    """Images of a data source, centre-cropped to `size` pixels a side as for training (`center_crop`)."""
    if isinstance(source, LatentSource):
        raise InputError(f"{source!r} holds latents, not images: give the images that they were made of")
    read = lambda i: to_pixels(source[int(indices[i])]["image"], size)  # noqa: E731
    return ReadImages(read, len(indices), (size, size, source.channels))


def labelled_images(source: Source, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of a small data source, (N, size, size, C) uint8, and their labels (N,)."""
    everything = range(len(source))
    return source_images(source, size, everything)[:], np.array([source[i]["label"] for i in everything])


def require_enough(count: int, name: str | Path) -> None:
    """Raise InputError for a set too small to have a covariance and neighbours."""
    if count < FEWEST:
        raise InputError(f"{name} holds {count or 'no'} image{'s' * (count != 1)}: expected at least {FEWEST}")


def open_array(path: Path, name: str) -> np.ndarray:
    """An array of an .npz: left on disk and mapped if it is stored as it is, read whole if it is compressed.

    Raises InputError if the file is damaged or lacks it.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                file.seek(member.header_offset + 26)  # of a zip's local header: lengths of name and of extra field
                lengths = np.frombuffer(file.read(4), "<u2")
                file.seek(member.header_offset + 30 + int(lengths.sum()))
                header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, by_columns, dtype = header[np.lib.format.read_magic(file)[0]](file)
                if not by_columns and not dtype.hasobject and np.prod(shape):
                    return np.memmap(path, dtype, "r", file.tell(), shape)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # what is wrong, if anything is, shows in reading it the usual way
    return read_npz(path, (name,))[name]


def array_names(path: Path) -> set[str]:
    """The arrays in an .npz. Raises InputError if it is missing or damaged."""
    read_npz(path, ())
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def recorded_settings(path: Path) -> dict[str, Any]:
    """The JSON that lies beside the pictures in an .npz, {} if none."""
    if SETTINGS not in array_names(path):
        return {}
    return parse_json(str(read_npz(path, (SETTINGS,))[SETTINGS]), f"the array {SETTINGS} of {path}")


def _folder_images(folder: Path, files: Sequence[Path]) -> ReadImages:
    require_enough(len(files), folder)

    first = _decoded(files[0])

    def read(i: int) -> np.ndarray:
        image = _decoded(files[i])
        if image.shape != first.shape:
            told = [
                f"{file} has {x.shape[1]}x{x.shape[0]} pixels, {x.shape[2]} channels"
                for file, x in ((files[i], image), (files[0], first))
            ]
            raise InputError(f"{told[0]}, but {told[1]}: expected pictures of one size and kind")
        return image

    return ReadImages(read, len(files), first.shape)


def _decoded(path: Path) -> np.ndarray:
    image = np.asarray(decode_image(path.read_bytes(), str(path), _channels(path)))
    return image[..., None] if image.ndim == 2 else image


def _channels(path: Path) -> int:
    """1 for a grey picture, 3 for any other, one that cannot be opened included."""
    try:
        with Image.open(path) as image:
            return 1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;") else 3
    except OSError:
        return 3
