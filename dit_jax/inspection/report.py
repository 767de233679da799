"""The numbers of an inspection as one JSON document, and the folder that shows them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.checkpoints.record import Record
from dit_jax.config import DiTConfig
from dit_jax.files import write_json
from dit_jax.inspection import figures, page
from dit_jax.inspection.ablation import Importance
from dit_jax.inspection.conditions import Modulations
from dit_jax.inspection.images import Images
from dit_jax.inspection.measure import Measurement
from dit_jax.inspection.roles import CUT, CUT_RULE, RULES, roles
from dit_jax.inspection.statistics import of_uniform_attention

Show = Callable[[np.ndarray], np.ndarray]
"""(B, S, S, C) pixels or latents -> (B, H, W, 1 or 3) uint8 pictures."""


def make_report(
    record: Record,
    images: Images,
    found: Measurement,
    modulations: Modulations,
    importance: Importance | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    """All numbers, as JSON has them. Arrays are nested lists whose axes `axes` names."""
    config = record.model
    uniform = of_uniform_attention(config.side)
    overall = {name: values.mean(axis=1, keepdims=True) for name, values in found.heads.items()}
    heads = {name: np.concatenate([overall[name], values], axis=1) for name, values in found.heads.items()}
    measured = roles(heads["distance"], heads["relative_entropy"], heads["sink"], uniform["distance"])
    heads = {name: np.where(config.head_exists, values, 0.0) for name, values in heads.items()}
    if config.block != "in-context":
        del heads["on_condition"]
    report = {
        "about": about | {"network": network(config), "images": [record.class_names[y] for y in images.labels]},
        "halves": found.halves,
        "timesteps": found.timesteps,
        "axes": {
            "heads, roles": "half, mean over timesteps and then each timestep, layer, head",
            "branches": "half, timestep, layer",
            "modulation.size": "timestep, label, layer",
            "importance.change, importance.error": "mean over timesteps and then each timestep, layer, head",
        },
        "uniform": uniform,
        "rules": [*RULES, CUT_RULE] if config.heads_left else RULES,
        "heads": heads,
        "roles": np.where(config.head_exists, measured, CUT),
        "branches": found.branches,
        "modulation": {
            "timesteps": modulations.timesteps,
            "labels": [*record.class_names, "none"] if config.class_dropout_prob else record.class_names,
            "chosen": modulations.labels,
            "size": modulations.sizes,
        },
        "widest_gate": None if found.widest_gate is None else np.where(config.head_exists, found.widest_gate, 0.0),
        "importance": None if importance is None else importance._asdict(),
    }
    report["modulation"]["labels"] = [report["modulation"]["labels"][y] for y in modulations.labels]
    return plain(report)


def network(config: DiTConfig) -> dict[str, Any]:
    """What a reader has to know of the architecture."""
    names = ("depth", "num_heads", "hidden_size", "input_size", "patch_size", "in_channels", "num_classes")
    more = ("attention", "head_gate", "block", "qk_norm", "rope", "heads_left")
    return {name: getattr(config, name) for name in names + more} | {"side": config.side, "head_dim": config.head_width}


def plain(content: Any) -> Any:
    """Arrays to lists of numbers of six digits, tuples to lists."""
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items()}
    if isinstance(content, np.ndarray | np.generic):
        return plain(content.tolist())
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content


def write_report(folder: Path, report: dict[str, Any], images: Images, found: Measurement, show: Show) -> None:
    """Write report.json, index.html and the figures (.png) into a folder."""
    viewed = sorted({view.image for view in found.views})
    clean = dict(zip(viewed, show(images.x0[viewed]), strict=True))
    noised = show(np.stack([view.x_t for view in found.views]))
    predicted = show(np.stack([view.x_start for view in found.views]))
    write_json(folder / "report.json", report)
    (folder / "index.html").write_text(page.make_page(report, found, clean, noised, predicted))
    for name, figure in figures.draw(report, found, clean).items():
        figure.savefig(folder / f"{name}.png", dpi=110)
