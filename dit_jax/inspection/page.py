"""One HTML page that needs nothing else: the numbers, the pictures and the attention of chosen patches are inside."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.inspection.measure import Measurement

TEMPLATE, STYLE, SCRIPT = (Path(__file__).with_name(f"page.{suffix}") for suffix in ("html", "css", "js"))


def make_page(
    report: dict[str, Any],
    found: Measurement,
    clean: Mapping[int, np.ndarray],
    noised: np.ndarray,
    predicted: np.ndarray,
) -> str:
    """The page. Pictures are (H, W, 1 or 3) uint8: clean by index of the image, the others one a view."""
    views = {
        "queries": found.queries.tolist(),
        "cells": round(found.views[0].weights.shape[-1] ** 0.5),
        "clean": {str(i): data_uri(picture) for i, picture in clean.items()},
        "items": [
            {
                "image": view.image,
                "half": view.half,
                "timestep": view.timestep,
                "noised": data_uri(noised[i]),
                "predicted": data_uri(predicted[i]),
                **packed(view.weights),
            }
            for i, view in enumerate(found.views)
        ],
    }
    as_json = lambda content: json.dumps(content).replace("</", "<\\/")  # noqa: E731  "</" would end the element
    parts = {"__STYLE__": STYLE.read_text(), "__REPORT__": as_json(report), "__VIEWS__": as_json(views)}
    text = TEMPLATE.read_text()
    for place, content in (parts | {"__SCRIPT__": SCRIPT.read_text()}).items():
        text = text.replace(place, content)
    return text


def packed(weights: np.ndarray) -> dict[str, str]:
    """(depth, heads, queries, cells) weights as bytes, in 255ths of each query's largest; and those, float32."""
    largest = weights.max(axis=-1, keepdims=True)
    scaled = np.round(255 * weights / np.maximum(largest, 1e-30)).astype(np.uint8)
    return {"weights": as_text(scaled.tobytes()), "largest": as_text(largest.astype("<f4").tobytes())}


def data_uri(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(file, "PNG")
    return "data:image/png;base64," + as_text(file.getvalue())


def as_text(content: bytes) -> str:
    return base64.b64encode(content).decode()
