"""Compile the real program for chips that are not here: does it fit, what does it cost, and how fast may it be.

TPUs need `pip install -e .[tpu]`, NVIDIA chips `.[cuda]`; neither needs the hardware.

Examples:
  python -m dit_jax.compile --config=configs/imagenet256.py --topology=v5e:4x4
  python -m dit_jax.compile --config=configs/imagenet256.py --topology=v5e:4x4 --largest_batch --json=report.json
  python -m dit_jax.compile --config=configs/imagenet512.py --topology=h100:8 --config.mesh.fsdp=8 \\
      --compare=model.remat=none --compare=model.remat=dots --compare=model.remat=full
  python -m dit_jax.compile --config=configs/imagenet512.py:DiT-S/2 --topology=v5e:4x4 \\
      --compare=model.attention=global --compare="model.attention=window:8*6,mixed:8*3,global*3"
"""

import json
import re
from contextlib import suppress

from absl import flags
from ml_collections import config_flags

from dit_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", help_string="Path of a config; --config.FIELD=VALUE changes it.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips: v5e:4x4, h100:8 or cpu:8; 2*v5e:4x4 for two slices, 2*h100:8 for two hosts."
)
WHAT = flags.DEFINE_enum("what", "train", ["train", "sample", "encode"], "The program, for config.batch_size images.")
COMPARE = flags.DEFINE_multi_string("compare", [], "A row of the table: FIELD=VALUE,... of the config. Give several.")
LARGEST = flags.DEFINE_bool("largest_batch", False, "Also look for the largest batch a chip, by bisection: slow.")
JSON = flags.DEFINE_string("json", None, "File for all that is printed, and more.")


def main() -> None:
    from dit_jax.parallel import chips

    chips.prepare(TOPOLOGY.value)

    from tqdm import tqdm

    from dit_jax.compilation import report
    from dit_jax.files import write_json

    devices, rows = chips.devices(TOPOLOGY.value), []
    for changes in tqdm(COMPARE.value or [""], desc=f"compiling for {TOPOLOGY.value}", unit="program"):
        config = changed(CONFIG.value, changes)
        rows.append(measured(config, devices))
        if LARGEST.value:
            rows[-1]["largest_batch_a_chip"] = largest_batch(config, devices)
    print(report.table(rows))
    if len(rows) == 1 and "memory" in rows[0]:
        print(details(rows[0]))
    elif winner := report.best(rows):
        print(f"best that fits: {COMPARE.value[rows.index(winner)]}, by the estimate")
    if JSON.value:
        write_json(JSON.value, {"topology": TOPOLOGY.value, "programs": rows})


def measured(config, devices) -> dict:
    """The report of one program."""
    from dit_jax.compilation import programs, report
    from dit_jax.parallel.chips import chip_of
    from dit_jax.parallel.mesh import make_mesh

    programs.resolve(WHAT.value, config, devices[0])
    return report.measure(WHAT.value, config, make_mesh(config.mesh, devices), chip_of(devices[0]))


def largest_batch(config, devices) -> int:
    """The most images a chip that fit."""
    from dit_jax.compilation import report

    def fits(images: int) -> bool:
        config.batch_size = images * len(devices)
        return measured(config, devices)["fits"]

    return report.largest_batch(fits, max(1, config.batch_size // len(devices)))


def changed(config, changes: str):
    """A copy of the config with `a.b=value,...` set. Raises InputError for a field that it does not have."""
    from ml_collections import ConfigDict

    from dit_jax.errors import InputError

    config = ConfigDict(config.to_dict()).lock()  # a copy to its depth, which takes no new fields
    for change in filter(None, re.split(r",(?=[\w.]+=)", changes)):  # a schedule of attention has commas of its own
        field, _, value = change.partition("=")
        with suppress(ValueError):  # a word stays what it is
            value = json.loads(value)
        try:
            config.update_from_flattened_dict({field: value})
        except (KeyError, TypeError) as error:
            raise InputError(
                f"--compare={change}: expected a field of the config and a value of its type, as mesh.fsdp=8"
            ) from error
    return config


def details(row: dict) -> str:
    """What the table has no room for."""
    memory, flops = row["memory"], row["flops"]
    lines = ["memory a chip, GiB: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())]
    total = flops["compiled"] + flops["attention_kernels"]
    lines.append(
        f"TFLOP a chip: {total / 1e12:.2f} compiled ({flops['attention_kernels'] / 1e12:.2f} of them in attention), "
        f"{flops['analytic'] / 1e12:.2f} analytic without recomputation ({total / flops['analytic']:.3f})"
    )
    for kind, collective in row["collectives"].items():
        away = f", {collective['outside'] / 1e9:.3f} of them out of its host or slice" if collective["outside"] else ""
        lines.append(f"{kind}: {collective['count']} times, {collective['bytes'] / 1e9:.3f} GB sent a chip{away}")
    if minimum := row.get("collectives_minimum"):
        sent = sum(collective["bytes"] for collective in row["collectives"].values())
        least = sum(minimum.values())
        parts = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in minimum.items() if size)
        lines.append(f"all together {sent / 1e9:.3f} GB; the least possible {least / 1e9:.3f} ({parts})")
    if estimate := row.get("estimate"):
        parts = ", ".join(f"{name} {seconds:.4f}" for name, seconds in estimate["parts"].items())
        lines.append(
            f"estimate: {estimate['seconds']:.4f} s a run, bound by {estimate['bound_by']} ({parts} s), "
            f"MFU {estimate['mfu']:.0%}; it is {estimate['formula']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)
