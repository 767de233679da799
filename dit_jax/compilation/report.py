"""What a program costs on the chips that it was compiled for: memory, products, traffic, talk; an estimate of time."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dit_jax.compilation.collectives import collectives
from dit_jax.compilation.hlo import Program
from dit_jax.compilation.programs import codec_of, lower
from dit_jax.config import DiTConfig
from dit_jax.models.dit import abstract_dit
from dit_jax.parallel.chips import Chip, usable_memory
from dit_jax.parallel.memory import live_bytes
from dit_jax.sampling.generate import network_passes
from dit_jax.training.flops import decoder_macs, encoder_macs, forward_macs, train_flops

FORMULA = (
    "the longest of FLOPs / peak (float32 at its own), traffic / bandwidth, bytes sent / bandwidth of the links or, "
    "between GPUs' hosts and slices of TPUs, of the hosts' network: published peaks, all at once"
)


def measure(what: str, config: ConfigDict, mesh: Mesh, chip: Chip | None) -> dict[str, Any]:
    """Compile a program and read off what it costs a chip; `fits` is False if it takes more memory than there is.

    Sizes are bytes of one device and of one run of the program, FLOPs two a multiply-accumulate; times in seconds.
    """
    started = time.perf_counter()
    lowered = lower(what, config, mesh)
    lowering, started = time.perf_counter() - started, time.perf_counter()
    report = {
        "what": what,
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "remat": config.model.remat,
        "attention": config.model.attention,
        "attention_kernel": config.model.attention_kernel,
        "dtype": config.model.dtype,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error):
            raise
        return report | {"fits": False, "reason": _needed(str(error))}
    report |= {"lower_seconds": lowering, "compile_seconds": time.perf_counter() - started}
    program, memory = Program(compiled.as_text()), _memory(compiled)
    analytic = _analytic_flops(what, config) / mesh.size
    if chip:
        memory |= {"chip": chip.memory, "usable": usable_memory(chip, mesh.devices.flat[0].platform)}
    report |= {
        "fits": chip is None or memory["live"] <= memory["usable"],
        "memory": memory,
        "flops": {
            "analytic": analytic,
            "compiled": program.flops,
            "by_precision": program.flops_by_precision,
            "attention_kernels": program.kernel_flops,
        },
        "traffic": program.traffic,
        "collectives": {
            kind: {"count": collective.runs, "bytes": collective.bytes, "outside": collective.outside}
            for kind, collective in collectives(program, _hosts(mesh)).items()
        },
    }
    if what == "train":
        report["collectives_minimum"] = minimum_sent(config, mesh)
    if chip:
        report["estimate"] = _estimate(report, chip)
    return report


def largest_batch(fits: Callable[[int], bool], start: int = 1) -> int:
    """The most images a device that fit, within an eighth: from `start` by doubling or halving, then by bisection; 0 if
    not even one does."""
    low, high = (start, 2 * start) if fits(start) else (start // 2, start)
    while low == start and fits(high):
        low = start = high
        high *= 2
    while low < start and low and not fits(low):
        low, high = low // 2, low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def minimum_sent(config: ConfigDict, mesh: Mesh) -> dict[str, float]:
    """Bytes that each device must send in a training step, in the dtypes that we compute in, by ring algorithms.

    Blocks' weights are gathered over fsdp forward, and again backward if rematerialisation has not kept them, and their
    gradients summed and scattered once; modulations stay where they are. Over data every gradient is summed and given
    to all. Over tensor each block sums its tokens twice forward and twice backward.
    """
    model = DiTConfig(**config.model)
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    paths = jax.tree_util.tree_leaves_with_path(abstract_dit(model)[1])
    gathered = staying = 0
    for path, leaf in paths:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("blocks/adaLN"):
            staying += 4 * leaf.size
        else:
            size = model.precision.results.itemsize if name.startswith("blocks/") else 4
            gathered += size * leaf.size / tensor
    tokens = model.tokens * config.batch_size / (data * fsdp)
    activations = tokens * model.hidden_size * model.precision.results.itemsize
    return {
        "all-gather": (1 if model.remat == "none" else 2) * gathered * (fsdp - 1) / fsdp,
        "reduce-scatter": gathered * (fsdp - 1) / fsdp,
        "all-reduce": 2 * (gathered + staying) / fsdp * (data - 1) / data
        + 4 * model.depth * 2 * activations * (tensor - 1) / tensor,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Reports as a table, one a line."""
    lines = ["".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items())]
    for row in rows:
        cells = []
        for width, cell in COLUMNS.values():
            try:
                cells.append(f"{cell(row):>{width}}")
            except KeyError:  # it does not fit, or the chip has no published numbers
                cells.append(" " * width)
        lines.append("".join(cells).rstrip() + (f"  {row['reason']}" if "reason" in row else ""))
    return "\n".join(lines)


def _sent(row: dict[str, Any]) -> float:
    return sum(kind["bytes"] for kind in row["collectives"].values())


def _flops(row: dict[str, Any]) -> float:
    return row["flops"]["compiled"] + row["flops"]["attention_kernels"]


def _bfloat16_flops(row: dict[str, Any], chip: Chip) -> float:
    """As many operations of bfloat16 as take the chip as long."""
    products = (chip.slowdown(precision) * flops for precision, flops in row["flops"]["by_precision"].items())
    return sum(products) + row["flops"]["attention_kernels"]


COLUMNS: dict[str, tuple[int, Callable[[dict], str]]] = {
    "mesh": (10, lambda row: "x".join(str(size) for size in row["mesh"].values())),
    "batch": (7, lambda row: str(row["batch_size"])),
    "remat": (7, lambda row: row["remat"]),
    "attention": (11, lambda row: row["attention_kernel"]),
    "fits": (6, lambda row: "yes" if row["fits"] else "no"),
    "live GiB": (10, lambda row: f"{row['memory']['live'] / 2**30:.2f}"),
    "TFLOP": (8, lambda row: f"{_flops(row) / 1e12:.2f}"),
    "GB moved": (10, lambda row: f"{row['traffic'] / 1e9:.1f}"),
    "GB sent": (9, lambda row: f"{_sent(row) / 1e9:.2f}"),
    "step s": (8, lambda row: f"{row['estimate']['seconds']:.3f}"),
    "MFU": (6, lambda row: f"{row['estimate']['mfu']:.0%}"),
    "largest": (9, lambda row: str(row["largest_batch_a_chip"])),
    "compiled s": (12, lambda row: f"{row['compile_seconds']:.0f}"),
}


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that fits and takes least time an image by the estimate, which has all parts of a step run at once.

    Of those within 1% of it, the one whose parts take least one after the other: real chips are between the two.
    """

    def seconds_an_image(row: dict[str, Any], together: Callable) -> float:
        return together(row["estimate"]["parts"].values()) / row["batch_size"]

    fitting = [row for row in rows if row["fits"] and "estimate" in row]
    least = min((seconds_an_image(row, max) for row in fitting), default=0)
    alike = [row for row in fitting if seconds_an_image(row, max) <= 1.01 * least]
    return min(alike, key=lambda row: seconds_an_image(row, sum), default=None)


def _hosts(mesh: Mesh) -> list[int]:
    """Of each GPU; TPUs of a slice are linked to each other whatever their hosts, and what leaves it says so itself."""
    devices = mesh.devices.flat
    return [device.process_index for device in devices] if devices[0].platform == "gpu" else []


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "live": live_bytes(compiled),
    }


def _needed(message: str) -> str:
    """The compiler's own words on what it needed and what there is."""
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    return f"needs {found[1]} of {found[2]}" if found else " ".join(message.split())[:200]


def _analytic_flops(what: str, config: ConfigDict) -> float:
    model, codec = DiTConfig(**config.model), codec_of(config)
    side = model.input_size * codec.downsample
    if what == "train":
        per_image = train_flops(model)
        if config.latents == "on_the_fly":
            per_image += 2 * encoder_macs(codec.config, side)
    elif what == "sample":
        per_image = 2 * forward_macs(model) * network_passes(config.diffusion, **config.sample)
        if codec.config:
            per_image += 2 * decoder_macs(codec.config, side)
    else:
        per_image = 2 * 2 * encoder_macs(codec.config, side)  # its mirror image too
    return per_image * config.batch_size


def _estimate(report: dict[str, Any], chip: Chip) -> dict[str, Any]:
    outside = sum(kind["outside"] for kind in report["collectives"].values())
    parts = {
        "compute": _bfloat16_flops(report, chip) / chip.flops,
        "memory": report["traffic"] / chip.bandwidth,
        "network": (_sent(report) - outside) / chip.links,
    }
    if outside and chip.outside:
        parts["hosts"] = outside / chip.outside
    seconds = max(parts.values())
    return {
        "seconds": seconds,
        "bound_by": max(parts, key=parts.get),
        "parts": parts,
        "mfu": report["flops"]["analytic"] / chip.flops / seconds,
        "formula": FORMULA,
    }
