"""Data sets of latents on disk: the bytes that were written, read by us and by TFDS, whole or refused in one line."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from dit_jax.data import latents
from dit_jax.data.latents import LatentSource, LatentWriter
from dit_jax.data.loader import Loader
from dit_jax.data.sources import open_source
from dit_jax.errors import InputError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.sharding import batch_sharding

RECORDS, SHARDS = 23, 4
SETTINGS = {
    "autoencoder": {"name": "tiny", "sha256": "5a" * 32, "scaling_factor": 0.5, "shift_factor": 0.25},
    "source": "folder:photos",
    "image_size": 8,
    "shape": (2, 4, 4, 8),
    "dtype": "float16",
    "class_names": ["a cat", "Hund, groß", "3"],
}

READ_WITHOUT_TENSORFLOW = """
import sys
from dit_jax.data.sources import open_source
source = open_source("latents:" + sys.argv[1])
read = [source[i] for i in range(len(source))]
print(len(read), [name for name in sys.modules if name.split(".")[0] == "tensorflow"])
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD_BYTES", 3000)


def examples(indices, dtype="float16"):
    """Record i: noise that is a function of i, and the label i modulo the classes."""
    noise = (np.random.default_rng(i).standard_normal((2, 4, 4, 8)).astype(dtype) for i in indices)
    return [(moments, i % 3) for i, moments in zip(indices, noise, strict=True)]


def start(folder: Path, **changes) -> LatentWriter:
    """What the command does: write the shards that are not done; returns before they are verified."""
    settings = SETTINGS | changes
    writer = LatentWriter(folder, RECORDS, settings)
    if not writer.is_complete():
        for shard in range(len(writer)):
            if not writer.is_done(shard):
                bounds = range(writer.bounds[shard], writer.bounds[shard + 1])
                writer.write(shard, examples(bounds, settings["dtype"]))
    return writer


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("latents-train.array_record-*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "SHARD_BYTES", 3000)
        folder = tmp_path_factory.mktemp("data") / "latents"
        assert start(folder).complete() == RECORDS
    return folder


@pytest.fixture
def copy(tmp_path, written):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def refused(told: str, opening, *args):
    """One line that holds `told`."""
    with pytest.raises(InputError, match=told) as caught:
        opening(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_written_is_read_bit_for_bit_by_us_and_by_tfds(tmp_path, dtype):
    start(tmp_path / "latents", dtype=dtype).complete()
    ours = LatentSource(tmp_path / "latents")
    theirs = tfds.builder_from_directory(tmp_path / "latents").as_data_source("train")
    assert len(ours) == len(theirs) == RECORDS
    for (moments, label), our, their in zip(examples(range(RECORDS), dtype), ours, theirs, strict=False):
        assert our["moments"].dtype == their["moments"].dtype == dtype
        assert our["moments"].tobytes() == their["moments"].tobytes() == moments.tobytes()
        assert our["label"] == their["label"] == label


def test_tfds_knows_shape_and_class_names(written):
    features = tfds.builder_from_directory(written).info.features
    assert isinstance(features["moments"], tfds.features.Tensor) and features["moments"].shape == SETTINGS["shape"]
    assert isinstance(features["label"], tfds.features.ClassLabel)
    assert features["label"].names == list(LatentSource(written).class_names) == SETTINGS["class_names"]


def test_reading_imports_no_tensorflow(written):
    result = subprocess.run([sys.executable, "-c", READ_WITHOUT_TENSORFLOW, written], capture_output=True, text=True)
    assert result.stdout == f"{RECORDS} []\n", result.stderr


def test_records_are_shared_out_among_shards_by_their_number_and_size(written):
    names = [f"latents-train.array_record-{shard:05d}-of-{SHARDS:05d}" for shard in range(SHARDS)]
    assert [path.name for path in shard_files(written)] == names
    (split,) = json.loads((written / "dataset_info.json").read_text())["splits"]
    assert split["shardLengths"] == ["5", "6", "6", "6"]


def test_metadata_says_what_made_it(written):
    metadata = LatentSource(written).metadata
    for name, value in SETTINGS.items():
        assert metadata[name] == (list(value) if isinstance(value, tuple) else value)
    assert [len(noted["sha256"]) for noted in metadata["shards"].values()] == [64] * SHARDS
    assert metadata["dit_jax"] and not (written / latents.DONE).exists()


def test_reading_and_verifying_change_nothing(written):
    before = contents(written)
    LatentSource(written)[3]
    assert LatentWriter(written, RECORDS, SETTINGS).complete() == RECORDS
    assert contents(written) == before


def test_the_loader_gives_global_arrays_of_moments_and_labels(written):
    sharding = batch_sharding(make_mesh())
    loader = Loader(open_source(f"latents:{written}"), image_size=1, batch_size=16, seed=3, sharding=sharding)
    expected = {moments.tobytes(): label for moments, label in examples(range(RECORDS))}
    with loader.batches(0) as batches:
        for batch in itertools.islice(batches, 3):
            assert batch.keys() == {"x", "y"}
            assert all(isinstance(array, jax.Array) and array.sharding == sharding for array in batch.values())
            assert batch["x"].shape == (16, 2, 4, 4, 8) and batch["x"].dtype == np.float16
            for moments, label in zip(np.asarray(batch["x"]), batch["y"], strict=True):
                assert expected[moments.tobytes()] == label


def test_a_data_set_in_the_making_is_not_opened(tmp_path):
    start(tmp_path)
    refused("not complete: run dit_jax.encode again", open_source, f"latents:{tmp_path}")


def test_a_folder_of_something_else_is_neither_opened_nor_written_to(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    refused("not a data set of latents", open_source, f"latents:{tmp_path}")
    refused("not a data set of latents", open_source, f"latents:{tmp_path / 'none'}")
    refused("holiday.jpg, which is not of a data set", LatentWriter, tmp_path, RECORDS, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("image_size", 16),
        ("dtype", "float32"),
        ("autoencoder", SETTINGS["autoencoder"] | {"sha256": "77" * 32}),
        ("source", "folder:others"),
    ],
)
@pytest.mark.parametrize("state", ["begun", "complete"])
def test_another_setting_is_refused_and_nothing_changes(tmp_path, state, setting, value):
    writer = start(tmp_path)
    if state == "complete":
        writer.complete()
    before = contents(tmp_path)
    refused(f"was begun with {setting}=", LatentWriter, tmp_path, RECORDS, SETTINGS | {setting: value})
    assert contents(tmp_path) == before


def test_a_missing_shard_is_refused(copy):
    shard_files(copy)[2].unlink()
    refused("00002-of-00004 is missing: copy the data set again", LatentSource, copy)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes(path: Path):
    data = np.fromfile(path, np.uint8)
    data[len(data) // 2 :][:64] ^= 255
    data.tofile(path)


@pytest.mark.parametrize("damage", [truncate, flip_bytes])
def test_a_damaged_record_is_never_read_as_a_whole_one(copy, written, damage):
    damage(shard_files(copy)[1])
    theirs, ours = LatentSource(written), LatentSource(copy)
    damaged = 0
    for index in range(RECORDS):
        try:
            assert ours[index]["moments"].tobytes() == theirs[index]["moments"].tobytes()
        except InputError as error:
            assert re.fullmatch(rf"record {index} of latents:.* mend it with dit_jax.encode", str(error))
            damaged += 1
    assert damaged


def test_a_record_with_a_label_that_the_metadata_does_not_name_is_refused(copy):
    metadata = json.loads((copy / latents.METADATA).read_text())
    (copy / latents.METADATA).write_text(json.dumps(metadata | {"class_names": metadata["class_names"][:1]}))
    source = LatentSource(copy)
    assert source[0]["label"] == 0
    refused("record 1 of latents:.* does not begin as one with its label", source.__getitem__, 1)


@pytest.mark.parametrize("damage", [truncate, flip_bytes, Path.unlink])
@pytest.mark.parametrize("state", ["begun", "complete"])
def test_a_damaged_shard_is_told_and_written_anew_by_the_next_start(tmp_path, written, state, damage):
    writer = start(tmp_path)
    if state == "complete":
        writer.complete()
    damage(shard_files(tmp_path)[1])
    whole = {path: path.stat().st_mtime_ns for path in shard_files(tmp_path) if "00001-of" not in path.name}
    refused("00001-of-00004 is damaged or missing: run the same command again", start(tmp_path).complete)
    refused("not complete: run dit_jax.encode again", LatentSource, tmp_path)
    assert start(tmp_path).complete() == RECORDS
    assert contents(tmp_path) == contents(written)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", latents.METADATA])
@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_damaged_file_beside_the_shards_is_refused(copy, name, content):
    (copy / name).unlink() if content is None else (copy / name).write_text(content)
    refused(str(copy), LatentSource, copy)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_the_command_mends_what_tfds_needs(copy, written, name):
    (copy / name).unlink()
    assert start(copy).complete() == RECORDS
    assert contents(copy) == contents(written)


def test_what_killed_starts_have_left_is_removed_in_the_end(tmp_path, written):
    (tmp_path / ".writable-77").touch()
    writer = start(tmp_path)
    for name in (".latents-train.77.array_record-00000-of-00004", ".metadata.77.json"):
        (tmp_path / name).write_bytes(b"half")
    writer.complete()
    assert contents(tmp_path) == contents(written)


def test_a_shard_whose_images_were_all_left_out_does_no_harm(tmp_path):
    writer = LatentWriter(tmp_path, RECORDS, SETTINGS)
    for shard in range(len(writer)):
        writer.write(shard, examples(range(2)) if shard != 1 else [])
    assert writer.complete() == 6
    source = LatentSource(tmp_path)
    assert [source[i]["label"] for i in range(len(source))] == [0, 1] * 3
