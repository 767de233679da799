import numpy as np
import pytest
from PIL import Image

from dit_jax.errors import InputError
from dit_jax.files import read_npz
from dit_jax.sampling.pictures import check_destination, save_grid, save_pictures

NAMES = ["cat", "dog", "a very long name of a class"]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8), np.array([0, 1, 2, 0, 1, 2])


def test_npz_holds_images_and_labels(tmp_path, pictures):
    save_pictures(tmp_path / "a.npz", *pictures, NAMES)
    arrays = read_npz(tmp_path / "a.npz", ("arr_0", "labels"))
    assert np.array_equal(arrays["arr_0"], pictures[0]) and np.array_equal(arrays["labels"], pictures[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_holds_each_picture_unchanged(tmp_path, pictures, channels):
    images = pictures[0][..., :channels]
    save_pictures(tmp_path / "out", images, pictures[1], NAMES)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files[:2]] == ["000000-0.png", "000001-1.png"]
    assert np.array_equal(np.asarray(Image.open(files[4])).reshape(16, 16, channels), images[4])


def test_grid_shows_every_picture_magnified_in_its_class_column(tmp_path, pictures):
    save_pictures(tmp_path / "grid.png", *pictures, NAMES)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 82 + 4, 3 * 68 + 4, 3)
    second_dog = grid[82 + 18 : 82 + 18 + 64, 4 + 68 : 4 + 68 + 64]
    assert np.array_equal(second_dog[::4, ::4], pictures[0][4])


def test_many_classes_make_a_square(tmp_path):
    images = np.zeros((16, 64, 64, 1), np.uint8)
    save_grid(tmp_path / "grid.png", images, [str(i) for i in range(16)])
    assert Image.open(tmp_path / "grid.png").size == (4 * 68 + 4, 4 * 82 + 4)


@pytest.mark.parametrize("name", ["a.png", "a.npz", "folder"])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        check_destination(tmp_path / "file" / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
