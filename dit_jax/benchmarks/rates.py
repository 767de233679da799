"""Rates of things done again and again: medians with their spread."""

import resource
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax
from tqdm import tqdm

from dit_jax.parallel.chips import peak_flops
from dit_jax.parallel.processes import is_first

Row = dict[str, Any]


def in_turn(runs: Mapping[str, Callable[[], Any]], images: int, repeats: int) -> list[Row]:
    """Rows of images a second; each run once to warm up, then all of them again and again, so that whatever else the
    machine does meets all alike. A run makes `images` images and is over when it returns."""
    quiet = not is_first()
    for call in tqdm(runs.values(), desc="warming up", unit="run", disable=quiet):
        call()
    rates = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc="measuring", unit="round", disable=quiet):
        for name, call in runs.items():
            started = time.perf_counter()
            call()
            rates[name].append(images / (time.perf_counter() - started))
    return [row(name, values) for name, values in rates.items()]


def row(name: str, rates: list[float]) -> Row:
    return {"name": name, "median": median(rates), "lowest": min(rates), "highest": max(rates)}


def compiled(program: Any, *arguments: Any) -> tuple[Callable, Row]:
    """A jitted function compiled for its arguments, and {"compile_seconds"}."""
    started = time.perf_counter()
    executable = program.lower(*arguments).compile()
    return executable, {"compile_seconds": time.perf_counter() - started}


def utilisation(rate: float, flops_per_image: float, devices: int) -> Row:
    """{"mfu"} of a rate in images a second over so many devices; nothing where no peak is published."""
    peak = peak_flops(jax.devices()[0])
    return {"mfu": rate * flops_per_image / (peak * devices)} if peak else {}


def peak_memory() -> Row:
    """{"peak_gib"}: the most that a device has held so far, or on a CPU this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    used = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"peak_gib": used / 2**30}


COLUMNS = {
    "evaluations": (13, "evaluations", "{}"),
    "agreement": (11, "agreement", "{:.1%}"),
    "spread_ratio": (8, "spread", "{:.2f}"),
    "classifier_frechet_distance": (10, "distance", "{:.3g}"),
    "median": (12, "images/s", "{:.2f}"),
    "lowest": (10, "lowest", "{:.2f}"),
    "highest": (10, "highest", "{:.2f}"),
    "mfu": (7, "MFU", "{:.1%}"),
    "peak_gib": (10, "peak GiB", "{:.2f}"),
    "compile_seconds": (11, "compile s", "{:.1f}"),
}


def table(rows: list[Row]) -> str:
    """Rows as text, with the columns that any of them has."""
    columns = {name: column for name, column in COLUMNS.items() if any(name in row for row in rows)}
    width = max(len(row["name"]) for row in rows)
    lines = [" " * width + "".join(f"{head:>{size}}" for size, head, _ in columns.values())]
    for row in rows:
        cells = (
            f"{form.format(row[name]) if name in row else '':>{size}}" for name, (size, _, form) in columns.items()
        )
        lines.append(f"{row['name']:{width}}" + "".join(cells).rstrip())
    return "\n".join(lines)
