"""From an image of any size to the square the model is trained on."""

import numpy as np
from PIL import Image

from dit_jax.errors import InputError


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM (Dhariwal & Nichol 2021), which every published DiT was trained on.

    While the short side is at least twice `size` pixels, both sides are halved by a box filter (floor division); then
    a bicubic resize brings the short side to `size` (the long side is rounded), and the centre is cut out, its offsets
    floored. An image of size x size pixels comes back unchanged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """A PIL image or a uint8 array (h, w, C) -> uint8 (size, size, C) by `center_crop`.

    An array that already has the size is returned as it is, whatever its channels.

    Raises:
      InputError: an array of other than 1 or 3 channels would have to be resampled.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == (size, size):
            return image
        if image.shape[2] not in (1, 3):
            raise InputError(
                f"an array of shape {image.shape} cannot be resized as an image: set image_size={image.shape[0]}, "
                f"or use a source of 1 or 3 channels"
            )
        image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    pixels = np.asarray(center_crop(image, size))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 in 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
