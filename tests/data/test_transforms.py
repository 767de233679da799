import numpy as np
import pytest
from PIL import Image

from dit_jax.data.transforms import center_crop, normalise, to_pixels
from dit_jax.errors import InputError


def _box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bicubic(x, a=-0.5):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _resample(pixels, size, axis, kernel, support):
    """One axis, every output pixel a normalised sum over its window; the definition, in float64."""
    count = pixels.shape[axis]
    scale = count / size
    stretch = max(scale, 1.0)
    weights = np.zeros((size, count))
    for i in range(size):
        centre = (i + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), count)
        window = kernel((np.arange(first, last) + 0.5 - centre) / stretch)
        weights[i, first:last] = window / window.sum()
    result = np.moveaxis(np.tensordot(weights, pixels, axes=(1, axis)), 0, axis)
    return np.clip(np.floor(result + 0.5), 0, 255)  # Pillow rounds halves up


def _resize(pixels, height, width, kernel, support):
    return _resample(_resample(pixels, width, 1, kernel, support), height, 0, kernel, support)


def _adm_crop(pixels, size):
    pixels = pixels.astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = _resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, _box, 0.5)
    height, width = pixels.shape[:2]
    short = min(height, width)
    pixels = _resize(pixels, round(height * (size / short)), round(width * (size / short)), _bicubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, 16), (75, 100, 16), (101, 67, 12), (33, 40, 16), (31, 90, 16), (16, 37, 16), (7, 5, 16), (64, 129, 32)],
)
def test_center_crop_is_the_crop_of_adm(height, width, size):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert cropped.shape == (size, size, 3)
    assert np.abs(cropped - _adm_crop(pixels, size)).max() <= 1


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (16, 16, 4)])
def test_array_of_the_right_size_is_not_resampled(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(to_pixels(pixels, shape[0]), pixels)


def test_image_of_the_right_size_is_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), 24), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_array_of_another_size_is_cropped_like_an_image(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
    cropped = to_pixels(pixels, 8)
    assert cropped.shape == (8, 8, channels)
    assert np.abs(cropped - _adm_crop(pixels, 8)).max() <= 1


def test_four_channels_are_never_resampled_as_if_they_were_colours():
    with pytest.raises(InputError, match=r"\(20, 20, 4\)"):
        to_pixels(np.zeros((20, 20, 4), np.uint8), 8)


def test_normalise_maps_bytes_onto_minus_one_to_one():
    x = normalise(np.arange(256, dtype=np.uint8))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, np.arange(256) / 127.5 - 1, atol=1e-7)
    assert (x[0], x[255]) == (-1.0, 1.0)
