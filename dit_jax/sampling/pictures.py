"""Pictures for people: a captioned grid."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_jax.files import replacing

CAPTION = 14  # pixels


def save_grid(path: str | Path, images: np.ndarray, captions: Sequence[str]) -> None:
    """Write (B, H, W, C) uint8 images as one PNG, row by row, each under its caption; small ones are magnified.

    Up to a dozen captions have a column each, if the images run through them; else the grid is about square.
    """
    columns = len(set(captions))
    if columns > 12 or len(images) < 2 * columns:
        columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    zoom = max(1, 64 // images.shape[1])
    tile = images.shape[1] * zoom
    cell_width, cell_height, margin = tile + 4, tile + CAPTION + 4, 4
    grid = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(CAPTION - 3)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = margin + i % columns * cell_width, margin + i // columns * cell_height
        while pen.textlength(caption, font) > tile:
            caption = caption[:-2] + "…"
        pen.text((left + tile / 2, top), caption, "black", font, anchor="ma")
        grid.paste(as_picture(image).resize((tile, tile), Image.Resampling.NEAREST), (left, top + CAPTION))
    with replacing(path) as temporary:
        grid.save(temporary)


def as_picture(image: np.ndarray) -> Image.Image:
    """image: (H, W, C) uint8, C 1 or 3."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
