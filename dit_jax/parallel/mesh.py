"""The device mesh: axes `data`, `fsdp` and `tensor`, always all three, of size 1 where unused."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dit_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all); one axis may be -1 and takes the devices that the others leave.

    The batch is split over data and fsdp, parameters over fsdp, heads and MLP features over tensor. Without a shape
    all devices are on the data axis. Of several TPU slices, the slow network between them carries the data axis only.
    Raises InputError if the sizes do not multiply to the number of devices, or data not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": -1, "fsdp": 1, "tensor": 1} | dict(shape or {})
    text = "x".join(str(sizes[axis]) for axis in AXES)
    if list(sizes.values()).count(-1) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise InputError(f"mesh {text} (data x fsdp x tensor): sizes are positive, and at most one is -1 (the rest)")
    rest, left = divmod(len(devices), math.prod(size for size in sizes.values() if size > 0))
    shape = tuple(rest if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    if left or math.prod(shape) != len(devices):
        raise InputError(f"mesh {text} (data x fsdp x tensor) does not fit {len(devices)} devices: set config.mesh")
    types = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    data, *others = shape
    if data % slices:
        raise InputError(
            f"mesh {text} (data x fsdp x tensor): {slices} slices divide the data axis, and {data} is not a multiple"
        )
    arranged = mesh_utils.create_hybrid_device_mesh((data // slices, *others), (slices, 1, 1), devices=devices)
    return Mesh(arranged, AXES, axis_types=types)
