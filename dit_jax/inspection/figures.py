"""The report's figures as pictures: roles, statistics, gates, importance, and where a patch looks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dit_jax.inspection.measure import Measurement
from dit_jax.inspection.roles import CUT

COLOURS = {
    "local": "#2a7f9e",
    "between": "#c9c5ba",
    "global": "#d9683c",
    "uniform": "#f0cf65",
    "sink": "#6a3d7c",
    CUT: "#f1efeb",
}
"""As the page has them."""
SHOWN_LAYERS, SHOWN_HEADS = 8, 8  # of the attention maps, evenly chosen


def draw(report: dict[str, Any], found: Measurement, clean: Mapping[int, np.ndarray]) -> dict[str, Figure]:
    """Figures by name, of a report and what was found."""
    drawn = {
        "roles": _roles(report),
        "statistics": _statistics(report),
        "conditions": _conditions(report),
        "attention": _attention(report, found, clean),
    }
    if report["importance"]:
        drawn["importance"] = _importance(report)
    return drawn


def _roles(report: dict[str, Any]) -> Figure:
    columns = ["all", *report["timesteps"]]
    names = [role for role in COLOURS if role in dict(report["rules"])]
    colours = ListedColormap([COLOURS[role] for role in names])
    norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    rows, (depth, heads) = len(report["halves"]), np.shape(report["roles"])[2:]
    width, height = max(1.3, 0.16 * heads), max(1.3, 0.16 * depth)
    figure = Figure((width * len(columns) + 1.6, (height + 0.6) * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False, sharex=True, sharey=True)
    for row, half in enumerate(report["halves"]):
        for column, name in enumerate(columns):
            numbers = np.vectorize(names.index)(report["roles"][row][column])
            axes[row, column].imshow(numbers, cmap=colours, norm=norm, aspect="auto")
            axes[row, column].set_title(f"t = {name}" if column else "mean over t", fontsize=9)
            _whole_ticks(axes[row, column], depth, heads)
            _lines_between(axes[row, column], depth, heads)
        axes[row, 0].set_ylabel(f"{half}\nlayer", fontsize=9)
    figure.supxlabel("head", fontsize=9)
    legend = [Patch(color=COLOURS[role], label=role) for role in names]
    figure.legend(handles=legend, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def _statistics(report: dict[str, Any]) -> Figure:
    titles = {
        "distance": "mean distance, patches",
        "entropy": "entropy, nats",
        "within_1": "share within 1 patch",
        "within_2": "share within 2 patches",
        "within_4": "share within 4 patches",
        "sink": "share on the same 1/32 of keys",
        "same_segment": "share on the same segment",
        "on_condition": "share on condition tokens",
    }
    names = [name for name in titles if name in report["heads"]]
    columns, rows = 4, -(-len(names) // 4)
    figure = Figure((3.0 * columns, 2.7 * rows), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        values = np.array(report["heads"][name][0][0])
        shown = axes.imshow(values, cmap="Blues", vmin=0, aspect="auto")
        axes.set_title(titles[name], fontsize=9)
        axes.set_xlabel("head", fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        _whole_ticks(axes, *values.shape)
        figure.colorbar(shown, ax=axes).ax.tick_params(labelsize=7)
    return figure


def _conditions(report: dict[str, Any]) -> Figure:
    modulation = report["modulation"]
    timesteps = modulation["timesteps"]
    figure = Figure((11, 5.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for row, branch in enumerate(("attention", "mlp")):
        for column, part in enumerate(("gate", "scale", "shift")):
            values = np.array(modulation["size"][f"{branch}_{part}"]).mean(axis=1).T
            x, y = np.arange(len(timesteps) + 1) - 0.5, np.arange(len(values) + 1) - 0.5
            shown = axes[row, column].pcolormesh(x, y, values, cmap="Blues", vmin=0)
            axes[row, column].set_title(
                f"{'MLP' if branch == 'mlp' else 'attention'} {part}, root mean square", fontsize=9
            )
            figure.colorbar(shown, ax=axes[row, column]).ax.tick_params(labelsize=7)
            places = np.linspace(0, len(timesteps) - 1, 5).round().astype(int)
            axes[row, column].set_xticks(places, [timesteps[i] for i in places], fontsize=8)
            _whole_ticks(axes[row, column], len(values))
    axes[0, 0].invert_yaxis()
    figure.supxlabel("timestep (mean over labels)", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    return figure


def _importance(report: dict[str, Any]) -> Figure:
    change, loss = np.array(report["importance"]["change"]), np.array(report["importance"]["loss"])
    columns = ["mean over t", *(f"t = {t}" for t in report["timesteps"])]
    relative = 100 * change / loss[:, None, None]
    figure = Figure((2.1 * len(columns) + 0.6, 2.9), layout="constrained")
    for i, (name, values) in enumerate(zip(columns, relative, strict=True)):
        axes, most = figure.add_subplot(1, len(columns), i + 1), max(float(np.abs(values).max()), 1e-9)
        shown = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        axes.set_title(name, fontsize=9)
        _whole_ticks(axes, *values.shape)
        bar = figure.colorbar(shown, ax=axes, orientation="horizontal", ticks=[-most, 0, most], format="%.3g")
        bar.ax.tick_params(labelsize=7)
    figure.supylabel("layer", fontsize=9)
    figure.suptitle("% of the loss that removing a head adds (columns: heads)", fontsize=9)
    return figure


def _attention(report: dict[str, Any], found: Measurement, clean: Mapping[int, np.ndarray]) -> Figure:
    """Where one patch in the middle of the first image looks from: layers down, heads across."""
    first = [view for view in found.views if view.image == found.views[0].image and view.half == 0]
    view, side = first[len(first) // 2], report["about"]["network"]["side"]
    rows, columns = np.divmod(found.queries, side)
    chosen = int(np.argmin(np.hypot(rows - side // 2, columns - side // 2)))
    row, column = rows[chosen], columns[chosen]
    depth, heads, _, cells = view.weights.shape
    layers = np.unique(np.linspace(0, depth - 1, min(depth, SHOWN_LAYERS)).round().astype(int))
    across = np.unique(np.linspace(0, heads - 1, min(heads, SHOWN_HEADS)).round().astype(int))
    figure = Figure((1.35 * len(across) + 0.7, 1.35 * len(layers) + 0.7), layout="constrained")
    axes = figure.subplots(len(layers), len(across), squeeze=False)
    whole = (-0.5, side - 0.5, side - 0.5, -0.5)
    picture = clean[view.image][..., 0] if clean[view.image].shape[-1] == 1 else clean[view.image]
    for i, layer in enumerate(layers):
        for j, head in enumerate(across):
            weights = view.weights[layer, head, chosen].reshape(round(cells**0.5), -1)
            if report["roles"][0][0][layer][head] != CUT:
                axes[i, j].imshow(picture, cmap="gray", vmin=0, vmax=255, extent=whole)
                axes[i, j].imshow(weights, cmap="inferno", alpha=0.75, extent=whole)
                axes[i, j].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="cyan", lw=1.2))
            axes[i, j].set_box_aspect(1)
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
            if i == 0:
                axes[i, j].set_title(f"head {head}", fontsize=8)
        axes[i, 0].set_ylabel(f"layer {layer}", fontsize=8)
    half, t = report["halves"][view.half], report["timesteps"][view.timestep]
    figure.suptitle(f"attention of the marked patch at t = {t}, {half}", fontsize=9)
    return figure


def _lines_between(axes: Any, depth: int, heads: int) -> None:
    """White lines between the cells of a map."""
    axes.hlines(np.arange(1, depth) - 0.5, -0.5, heads - 0.5, color="white", lw=1)
    axes.vlines(np.arange(1, heads) - 0.5, -0.5, depth - 0.5, color="white", lw=1)


def _whole_ticks(axes: Any, depth: int, heads: int | None = None) -> None:
    """Layers and heads are counted: no tick lies between two of them."""
    axes.set_yticks(range(0, depth, -(-depth // 8)))
    if heads is not None:
        axes.set_xticks(range(0, heads, -(-heads // 8)))
    axes.tick_params(labelsize=7)
