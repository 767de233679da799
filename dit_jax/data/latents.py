"""Data sets of latents: an autoencoder's posterior moments of each image and of its mirror image, as ArrayRecord.

    FOLDER/
      latents-train.array_record-00000-of-00004 ...   records: moments (2, h, w, 2C), label
      features.json, dataset_info.json                what TFDS needs to open it, without TensorFlow
      metadata.json                                   written last: what made it, and each shard's SHA-256

Training flips by choosing one of the two, and draws from the posterior anew at every epoch.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax import __version__
from dit_jax.errors import InputError
from dit_jax.files import digest, make_folder, read_json, replacing, write_json

METADATA = "metadata.json"
DONE = "done"  # folder with a note of every finished shard, while the data set is not complete
SHARD_BYTES = 256 * 2**20
Example = tuple[np.ndarray, int]
"""moments (2, h, w, 2C) of an image and its mirror image, mean first and then log-variance; and the label."""


class LatentSource:
    """A complete data set of latents, by index. Safe to read from many threads.

    `metadata` says what made it: autoencoder, its SHA-256, scale and shift, image size, source, dtype and shape.
    """

    def __init__(self, folder: str | Path):
        import tensorflow_datasets as tfds

        self.folder = Path(folder).expanduser()
        self.metadata = read_metadata(self.folder)
        self.class_names = tuple(self.metadata["class_names"])
        self.shape, self.dtype = tuple(self.metadata["shape"]), np.dtype(self.metadata["dtype"])
        self._size = math.prod(self.shape) * self.dtype.itemsize
        self.channels = self.shape[-1] // 2
        paths = [str(self.folder / name) for name in self.metadata["shards"]]
        if lacking := [path for path in paths if not os.path.exists(path)]:
            raise InputError(f"{lacking[0]} is missing: copy the data set again, or make it again with dit_jax.encode")
        self._labels = _labels_by_head(self.metadata)
        try:
            self._records = tfds.builder_from_directory(self.folder).as_data_source(
                "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except Exception as error:  # TFDS meets each file's damage with another type
            raise InputError(_damaged(self.folder, error)) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._records[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(_damaged(f"record {index} of {self!r}", error)) from error
        head = max(len(record) - self._size, 0)
        if (label := self._labels.get(record[:head])) is None:
            raise InputError(_damaged(f"record {index} of {self!r}", "it does not begin as one with its label"))
        return {"moments": np.frombuffer(record, self.dtype, offset=head).reshape(self.shape), "label": label}

    def __repr__(self) -> str:
        return f"latents:{self.folder}"


def read_metadata(folder: Path) -> dict[str, Any]:
    """What made a data set of latents. Raises InputError if it is not one, or not complete."""
    if not (folder / METADATA).exists():
        begun = (folder / DONE).is_dir()
        state = "complete: run dit_jax.encode again" if begun else "a data set of latents: make one with dit_jax.encode"
        raise InputError(f"{folder} is not {state} (it has no {METADATA})")
    kinds = {"autoencoder": dict, "shape": list, "dtype": str, "class_names": list, "shards": dict}
    metadata = read_json(folder / METADATA, **kinds)
    if lacking := kinds.keys() - metadata.keys():
        raise InputError(f"{folder / METADATA} lacks {min(lacking)}")
    return metadata


class LatentWriter:
    """The shards of a data set in the making: each written whole or not at all, those of an earlier start kept.

    Which records a shard holds depends on their number and size alone, so that processes share the shards out, and a
    start that goes on from a killed one ends with the same bytes.
    """

    def __init__(self, folder: str | Path, records: int, settings: dict[str, Any]):
        """settings: what the metadata will say, with the `shape` and `dtype` of moments and the `class_names`.

        Raises InputError if the folder holds something else, or was begun with other settings.
        """
        self.folder, self.settings = make_folder(folder), json.loads(json.dumps(settings))
        size = math.prod(settings["shape"]) * np.dtype(settings["dtype"]).itemsize
        count = max(1, round(records * size / SHARD_BYTES))
        self.bounds = [records * shard // count for shard in range(count + 1)]
        self._require_same_settings()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def is_complete(self) -> bool:
        return (self.folder / METADATA).exists()

    def is_done(self, shard: int) -> bool:
        return self._note(shard).exists()

    def write(self, shard: int, examples: Iterable[Example]) -> None:
        """Write a shard whole, then note that it is done."""
        from array_record.python.array_record_module import ArrayRecordWriter

        serialise, records = _serialiser(self.settings), 0
        with replacing(self._path(shard)) as temporary:
            # One record a group, to be read in any order; not compressed, for latents are noise and reading is what
            # limits a host that feeds several chips.
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            for moments, label in examples:
                writer.write(serialise({"moments": moments, "label": label}))
                records += 1
            writer.close()
            sha256 = digest(temporary)
        write_json(self._note(shard), {"records": records, "sha256": sha256})

    def complete(self, progress: Callable[[Iterable], Iterable] = iter) -> int:
        """Verify every shard and make them a data set, the metadata last; returns the number of records.

        Raises InputError where a file is not what was written; the next start writes that shard again.
        """
        shards = {}
        if self.is_complete():
            shards = read_metadata(self.folder)["shards"]
        else:
            for shard in range(len(self)):
                shards[self._path(shard).name] = json.loads(self._note(shard).read_text())
        for shard in progress(range(len(self))):
            self._verify(shard, shards[self._path(shard).name])
        self._write_tfds_files(shards)
        if not self.is_complete():
            write_json(self.folder / METADATA, self.settings | {"shards": shards, "dit_jax": __version__})
        self._sweep()
        return sum(noted["records"] for noted in shards.values())

    def _verify(self, shard: int, noted: dict) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        path = self._path(shard)
        if path.exists() and digest(path) == noted["sha256"]:
            reader = ArrayRecordReader(str(path))
            records = reader.num_records()
            reader.close()
            if records == noted["records"]:
                return
        self._forget(shard)
        raise InputError(f"{path} is damaged or missing: run the same command again, which writes it anew")

    def _forget(self, shard: int) -> None:
        """Go back to the state in which all but this shard are done."""
        if self.is_complete():
            metadata = read_metadata(self.folder)
            self._begin()
            for number, noted in enumerate(metadata["shards"].values()):
                self._note(number).write_text(json.dumps(noted))
            (self.folder / METADATA).unlink()
        self._note(shard).unlink()

    def _write_tfds_files(self, shards: dict[str, dict]) -> None:
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            data_dir=self.folder, dataset_name="latents", split="train", filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[noted["records"] for noted in shards.values()],
            num_bytes=sum((self.folder / name).stat().st_size for name in shards),
            filename_template=template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self.folder,
            features=_features(self.settings),
            split_infos=[split],
            version="1.0.0",
            check_data=False,  # that needs TensorFlow
        )

    def _sweep(self) -> None:
        """Remove what only the making needed, and what killed starts have left."""
        shutil.rmtree(self.folder / DONE, ignore_errors=True)
        for pattern in (".writable-*", ".latents-train.*", ".metadata.*"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _path(self, shard: int) -> Path:
        return self.folder / f"latents-train.array_record-{shard:05d}-of-{len(self):05d}"

    def _note(self, shard: int) -> Path:
        return self.folder / DONE / f"{shard:05d}.json"

    def _begin(self) -> None:
        make_folder(self.folder / DONE)
        write_json(self.folder / DONE / "settings.json", self.settings)

    def _require_same_settings(self) -> None:
        begun = self.folder / DONE / "settings.json"
        if self.is_complete():
            theirs = read_metadata(self.folder)
        elif begun.exists():
            theirs = read_json(begun)
        elif found := [entry.name for entry in self.folder.iterdir() if entry.name != DONE and entry.name[0] != "."]:
            raise InputError(f"{self.folder} holds {found[0]}, which is not of a data set of latents: choose another")
        else:
            self._begin()
            return
        if differing := [name for name, value in self.settings.items() if value != theirs.get(name)]:
            name = differing[0]
            raise InputError(
                f"{self.folder} was begun with {name}={str(theirs.get(name))[:80]}, now it is "
                f"{str(self.settings[name])[:80]}: choose another --out, or the settings as they were"
            )


def _serialiser(metadata: dict[str, Any]) -> Callable[[dict[str, Any]], bytes]:
    """From {"moments", "label"} to the bytes that TFDS reads, the same ones in every process."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = _features(metadata)
    serializer = ExampleSerializer(features.get_serialized_info())

    def serialise(example: dict[str, Any]) -> bytes:
        # What TFDS does itself, but for `deterministic`: else each process has an order of the fields of its own.
        return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)

    return serialise


def _labels_by_head(metadata: dict[str, Any]) -> dict[bytes, int]:
    """Each label by what comes in a record before its moments, which are the last field.

    Looking that up takes 1 us a record under Python's lock, which is what limits a host that feeds several chips.
    TFDS's parsing takes 30 us. Protobuf's takes 6, and now and then has malloc give back to the operating system all
    that is free, on a CPU a training step's memory too.
    """
    moments = np.zeros(metadata["shape"], metadata["dtype"])
    serialise, labels = _serialiser(metadata), range(len(metadata["class_names"]))
    return {serialise({"moments": moments, "label": label})[: -moments.nbytes]: label for label in labels}


def _damaged(what: str | Path, error: Exception | str) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{what} cannot be read ({reason}): copy the data set again, or mend it with dit_jax.encode"


def _features(metadata: dict[str, Any]):
    """What TFDS calls the features of a record."""
    from tensorflow_datasets import features

    shape, dtype = tuple(metadata["shape"]), np.dtype(metadata["dtype"])
    moments = features.Tensor(shape=shape, dtype=dtype, encoding=features.Encoding.BYTES)  # else floats of 4 bytes
    return features.FeaturesDict({"moments": moments, "label": features.ClassLabel(names=metadata["class_names"])})
