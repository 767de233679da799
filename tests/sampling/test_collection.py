"""Pictures on their way to disk: whole parts only, none drawn twice, one file whatever happened on the way."""

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dit_jax.errors import InputError
from dit_jax.files import read_npz
from dit_jax.sampling.collection import PART, check_destination, open_collection

COUNT = 2 * PART + 40
SETTINGS = {"seed": 0, "steps": 4, "count": COUNT}
NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8), np.arange(COUNT, dtype=np.int32) % 3


def draw(path, pictures, batch, settings=SETTINGS, until=COUNT) -> list[int]:
    """Add what is lacking, as `sample` does, up to a batch; complete it unless stopped. Returns what was drawn."""
    images, labels = pictures
    collection = open_collection(path, labels, NAMES, settings)
    padded = np.concatenate([images, images])  # a last batch has more than is asked for
    drawn = [i for i in range(0, COUNT, batch) if collection.lacks(range(i, i + batch))]
    for i in drawn:
        if i >= until:
            return drawn[: drawn.index(i)]
        collection.add(i, padded[i : i + batch])
    collection.complete()
    return drawn


@pytest.mark.parametrize("batch", [1, 50, 64, PART, 200, 500])
def test_an_archive_is_what_adm_reads_with_labels_and_settings_the_same_bytes_for_any_batch(tmp_path, pictures, batch):
    draw(tmp_path / "one.npz", pictures, COUNT)
    draw(tmp_path / "a.npz", pictures, batch)
    arrays = read_npz(tmp_path / "a.npz", ("arr_0", "labels", "settings"))
    assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(arrays["arr_0"], pictures[0])
    assert np.array_equal(arrays["labels"], pictures[1])
    assert arrays["settings"].shape == () and json.loads(str(arrays["settings"])) == SETTINGS
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "one.npz"], "the parts are gone"


@pytest.mark.parametrize("batch", [50, 64, 200])
def test_finished_parts_are_kept_and_the_rest_is_drawn_by_any_batch(tmp_path, pictures, batch):
    draw(tmp_path / "one.npz", pictures, COUNT)
    draw(tmp_path / "a.npz", pictures, 64, until=PART + 64)
    kept = sorted(path.name for path in (tmp_path / "a.npz.parts").iterdir())
    assert kept == ["00000.npy", "settings.json"]
    assert draw(tmp_path / "a.npz", pictures, batch)[0] == PART // batch * batch
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert draw(tmp_path / "a.npz", pictures, batch) == [], "what is complete is not drawn again"


def test_a_part_cut_short_is_drawn_again(tmp_path, pictures):
    draw(tmp_path / "a.npz", pictures, PART, until=2 * PART)
    part = tmp_path / "a.npz.parts" / "00001.npy"
    part.write_bytes(part.read_bytes()[:-1])
    assert draw(tmp_path / "a.npz", pictures, PART) == [PART, 2 * PART]
    assert np.array_equal(read_npz(tmp_path / "a.npz", ("arr_0",))["arr_0"], pictures[0])


@pytest.mark.parametrize("name", ["a.npz", "folder"])
def test_parts_of_other_settings_are_refused_in_one_line(tmp_path, pictures, name):
    draw(tmp_path / name, pictures, PART, until=PART)
    with pytest.raises(InputError, match=r"was begun with seed=0, now it is 1: choose another --out"):
        draw(tmp_path / name, pictures, PART, settings=SETTINGS | {"seed": 1})


def test_an_archive_of_other_settings_is_replaced_when_the_new_one_is_whole(tmp_path, pictures):
    draw(tmp_path / "a.npz", pictures, PART)
    draw(tmp_path / "a.npz", (255 - pictures[0], pictures[1]), PART, SETTINGS | {"seed": 1}, until=PART)
    assert np.array_equal(read_npz(tmp_path / "a.npz", ("arr_0",))["arr_0"], pictures[0])
    draw(tmp_path / "a.npz", (255 - pictures[0], pictures[1]), PART, SETTINGS | {"seed": 1})
    assert np.array_equal(read_npz(tmp_path / "a.npz", ("arr_0",))["arr_0"], 255 - pictures[0])


def test_a_large_archive_is_put_together_in_little_memory(tmp_path):
    parts = 8  # of 25 MB
    images, labels = np.full((PART, 256, 256, 3), 7, np.uint8), np.zeros(parts * PART, np.int32)
    collection = open_collection(tmp_path / "a.npz", labels, NAMES, {})
    tracemalloc.start()
    for part in range(parts):
        collection.add(part * PART, images)
    collection.complete()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > parts * images.nbytes > 2e8
    assert peak < 2.2 * images.nbytes


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_holds_each_picture_unchanged_and_the_settings(tmp_path, pictures, channels):
    images = pictures[0][..., :channels]
    draw(tmp_path / "out", (images, pictures[1]), 100)
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == COUNT + 1 and [file.name for file in files[:2]] == ["000000-0.png", "000001-1.png"]
    assert np.array_equal(np.asarray(Image.open(files[4])).reshape(8, 8, channels), images[4])
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == SETTINGS


def test_pictures_that_are_in_a_folder_are_not_drawn_again(tmp_path, pictures):
    draw(tmp_path / "out", pictures, 64, until=PART)
    assert draw(tmp_path / "out", pictures, 100)[0] == 100
    assert len(list((tmp_path / "out").glob("*.png"))) == COUNT


def test_a_folder_of_pictures_of_unknown_settings_is_refused(tmp_path, pictures):
    Image.new("L", (8, 8)).save(tmp_path / "000000-3.png")
    with pytest.raises(InputError, match=r"no settings\.json that tells which"):
        draw(tmp_path, pictures, 64)


def test_a_grid_shows_what_was_asked_for(tmp_path, pictures):
    draw(tmp_path / "grid.png", pictures, 200)
    rows = -(-COUNT // 3)
    assert Image.open(tmp_path / "grid.png").size == (3 * 68 + 4, rows * 82 + 4)


@pytest.mark.parametrize("name", ["a.png", "a.npz", "folder"])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        check_destination(tmp_path / "file" / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
