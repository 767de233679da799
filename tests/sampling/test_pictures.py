import numpy as np
import pytest
from PIL import Image

from dit_jax.sampling.pictures import save_grid

NAMES = ["cat", "dog", "a very long name of a class"]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8), np.array([0, 1, 2, 0, 1, 2])


def test_grid_shows_every_picture_magnified_in_its_class_column(tmp_path, pictures):
    save_grid(tmp_path / "grid.png", pictures[0], [NAMES[label] for label in pictures[1]])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 82 + 4, 3 * 68 + 4, 3)
    second_dog = grid[82 + 18 : 82 + 18 + 64, 4 + 68 : 4 + 68 + 64]
    assert np.array_equal(second_dog[::4, ::4], pictures[0][4])


def test_many_classes_make_a_square(tmp_path):
    images = np.zeros((16, 64, 64, 1), np.uint8)
    save_grid(tmp_path / "grid.png", images, [str(i) for i in range(16)])
    assert Image.open(tmp_path / "grid.png").size == (4 * 68 + 4, 4 * 82 + 4)
