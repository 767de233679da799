"""The chips that DiT runs on: what their vendors publish, and devices of them to compile for without having any."""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from dit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published numbers of one chip (vendors' data sheets; TPU pages of Google Cloud)."""

    kinds: tuple[str, ...]
    """Parts of its `device_kind` in JAX."""
    flops: float
    """Dense bfloat16 peak, FLOP/s."""
    memory: float
    """Bytes of main memory."""
    bandwidth: float
    """Of main memory, bytes/s."""
    links: float
    """Bytes/s that it sends to its neighbours, over all links."""
    outside: float | None = None
    """Its part of what its host sends to others, bytes/s: of a TPU to other slices, of a GPU by InfiniBand, as in an
    NVIDIA DGX; None where nothing is published."""
    vector_memory: int = 0
    """Bytes in which a core of a TPU computes, by JAX's `pltpu.get_tpu_info_for_chip`."""
    float32: float | None = None
    """Peak in float32 of a GPU without its tensor cores, FLOP/s; None of a TPU."""

    def slowdown(self, precision: str) -> float:
        """How much longer than one of bfloat16 a product takes at best: of "narrow" numbers, or of float32 in JAX's
        "default", "high" or "highest" precision.

        TPUs make one, three or six of bfloat16 of it; GPUs one of TF32, at half of their peak, or of float32 itself.
        """
        if precision == "narrow":
            return 1.0
        if self.float32 is None:
            return {"default": 1.0, "high": 3.0, "highest": 6.0}[precision]
        return self.flops / self.float32 if precision == "highest" else 2.0


CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1228e9, 300e9, None, 16 * 2**20),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, 25e9 / 8, 128 * 2**20),
    "v5p": Chip(("TPU v5",), 459e12, 95 * 2**30, 2765e9, 600e9, 50e9 / 8, 64 * 2**20),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1640e9, 400e9, 100e9 / 8, 128 * 2**20),
    # A half of it, which is what JAX calls a device.
    "tpu7x": Chip(("TPU7x",), 2307e12 / 2, 96 * 2**30, 7380e9 / 2, 600e9 / 2, 100e9 / 8 / 2, 64 * 2**20),
    "a100": Chip(("A100",), 312e12, 80e9, 2039e9, 300e9, 25e9, float32=19.5e12),
    "h100": Chip(("H100",), 989e12, 80e9, 3352e9, 450e9, 50e9, float32=67e12),
    "h200": Chip(("H200",), 989e12, 141e9, 4800e9, 450e9, 50e9, float32=67e12),
    "b200": Chip(("B200",), 2250e12, 180e9, 8000e9, 900e9, 50e9, float32=75e12),
}

# What XLA's GPU compiler asks of a device: streaming multiprocessors, shared memory and L2 in bytes, clock in GHz,
# compute capability (NVIDIA's data sheets; CUDA programming guide, "Compute Capabilities").
GPUS = {
    "a100": dict(
        sms=108, shared=167936, per_block=166912, l2=41943040, clock=1.41, major=8, name="NVIDIA A100-SXM4-80GB"
    ),
    "h100": dict(
        sms=132, shared=233472, per_block=232448, l2=52428800, clock=1.98, major=9, name="NVIDIA H100 80GB HBM3"
    ),
    "h200": dict(sms=132, shared=233472, per_block=232448, l2=52428800, clock=1.98, major=9, name="NVIDIA H200"),
    "b200": dict(sms=148, shared=233472, per_block=232448, l2=132644864, clock=1.96, major=10, name="NVIDIA B200"),
}

USAGE = (
    "v5e:4x4 (v4, v5e, v5p, v6e, tpu7x), h100:8 (a100, h100, h200, b200) or cpu:8; 2*v5e:4x4 for two slices, 2*h100:8 "
    "for two hosts"
)


def chip_of(device: jax.Device) -> Chip | None:
    """What is published of a device, or None (CPUs)."""
    return next((chip for chip in CHIPS.values() if any(kind in device.device_kind for kind in chip.kinds)), None)


def peak_flops(device: jax.Device) -> float | None:
    """The device's peak in FLOP/s, or None where none is published."""
    chip = chip_of(device)
    return chip and chip.flops


def usable_memory(chip: Chip, platform: str) -> float:
    """Bytes of a chip's memory that programs get: of a GPU's JAX takes a fraction for them, 0.75 if it is not told."""
    if platform != "gpu":
        return chip.memory
    told = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")  # its old name
    return float(told or 0.75) * chip.memory


def training_options(device: jax.Device) -> dict[str, bool | int | str]:
    """What the compiler of a program that trains on such devices is told, to go with `jax.jit`.

    GPUs take no kernel whose sums depend on which thread comes first: of cuDNN's for attention backward one does, and
    that for the gradient of a label which a batch has twice. JAX 0.12 would take none of Triton's then. TPU7x
    multiplies weights when all of them are gathered: in parts, as they come, XL/2 moves 139 GB on each of 16 devices,
    and so 43. On v5e it would move 22 and not 20, and on v5p send 3.2 and not 2.6.
    """
    if device.device_kind == "TPU7x":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
    if device.platform != "gpu":
        return {}
    triton = {"xla_gpu_experimental_deterministic_ops_triton": "DETERMINISTIC_OPS_TRITON_MODE_UNCHECKED"}
    return {"xla_gpu_exclude_nondeterministic_ops": True} | (triton if jax.__version_info__ >= (0, 12) else {})


def prepare(topology: str) -> None:
    """Set what the compilers for a topology read from the environment, before anything touches a device.

    Raises InputError for a name that means nothing."""
    found = re.fullmatch(r"([1-9]\d*\*)?(\w+):([1-9]\d*)((?:x[1-9]\d*)*)", topology)
    slices, chip, count, shape = found.groups() if found else (None, "", None, None)
    line = chip in GPUS or chip == "cpu"  # and no grid
    if (chip not in CHIPS and chip != "cpu") or (line and shape) or (chip == "cpu" and slices):
        raise InputError(f"topology {topology!r}: expected one such as {USAGE}")
    jax.config.update("jax_platforms", "cpu")  # of this process; the compilers need no device
    if chip == "cpu":
        jax.config.update("jax_num_cpu_devices", int(count))
    elif chip in GPUS:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    else:  # libtpu looks for the machine that it is on, and complains about each thing that it does not find
        os.environ |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is held that two could want
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        }


def devices(topology: str) -> list[jax.Device]:
    """Devices of a topology, after `prepare`: to make a mesh of and to compile for, not to run on."""
    slices, _, rest = topology.rpartition("*")
    chip, _, shape = rest.partition(":")
    if chip == "cpu":
        return jax.devices("cpu")
    try:
        if chip in GPUS:
            return _gpus(chip, int(shape), int(slices or 1))
        return _tpus(chip, [int(side) for side in shape.split("x")], int(slices or 1))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        package = "jax[cuda12]" if chip in GPUS else "jax[tpu]"
        reason = str(error).splitlines()[0][:200]
        if reason.startswith("INVALID_ARGUMENT"):
            raise InputError(f"topology {topology!r} ({reason}): expected one such as {USAGE}") from error
        raise InputError(f"no compiler for {topology} here ({reason}): pip install '{package}'") from error


def _tpus(chip: str, shape: list[int], slices: int) -> list[jax.Device]:
    options = {"num_slices": slices} if slices > 1 else {}
    if math.prod(shape) < 4:
        options["chips_per_host_bounds"] = tuple(shape + [1] * (3 - len(shape)))
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as on v5p
    name = f"{chip}:{'x'.join(map(str, shape))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _gpus(chip: str, count: int, hosts: int) -> list[jax.Device]:
    gpu, data = GPUS[chip], CHIPS[chip]
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  fpus_per_core: 128
          shared_memory_per_block: 49152  shared_memory_per_core: {gpu["shared"]}
          shared_memory_per_block_optin: {gpu["per_block"]}  registers_per_core_limit: 65536
          registers_per_block_limit: 65536  core_count: {gpu["sms"]}  l2_cache_size: {gpu["l2"]}
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          memory_bandwidth: {data.bandwidth:.0f}  device_memory_size: {data.memory:.0f}  clock_rate_ghz: {gpu["clock"]}
          cuda_compute_capability {{ major: {gpu["major"]} }}
        }}
        platform_name: "CUDA"  device_description_str: "{gpu["name"]}"
        dnn_version_info {{ major: 9  minor: 8 }}  runtime_version {{ major: 12  minor: 8 }}
    """
    shape = f"1x{hosts}x{count}"
    return topologies.get_topology_desc(
        platform="cuda", topology_name=chip, topology=shape, target_config=target
    ).devices
