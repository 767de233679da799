import jax
import pytest

from dit_jax.errors import InputError
from dit_jax.parallel.mesh import make_mesh


def test_by_default_all_devices_share_the_data():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_minus_one_takes_the_rest():
    mesh = make_mesh({"data": 2, "fsdp": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_mesh_over_some_devices():
    assert make_mesh(devices=jax.devices()[:3]).size == 3


@pytest.mark.parametrize(
    "shape", [{"data": 3}, {"data": 16}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"data": 2, "fsdp": 2}, {"tensor": 3}]
)
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(InputError, match="data x fsdp x tensor"):
        make_mesh(shape)


class Chip:
    """What a mesh asks of a TPU: four of them in a slice of 2 x 2."""

    platform, device_kind, core_on_chip = "tpu", "TPU v4", 0

    def __init__(self, index: int):
        self.id, self.slice_index, self.process_index = index, index // 4, index // 4
        self.coords = (index % 2, index // 2 % 2, 0)

    def __repr__(self) -> str:
        return str(self.id)


def test_slices_divide_the_data_axis_only():
    chips = [Chip(index) for index in (5, 0, 7, 2, 4, 1, 6, 3)]
    for shape in ({"data": -1}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}):
        mesh = make_mesh(shape, chips)
        assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1} | dict(shape) | {"data": mesh.shape["data"]}
        assert mesh.axis_types == make_mesh().axis_types
        slices = [[{chip.slice_index for chip in row.flat}] for row in mesh.devices]
        half = len(slices) // 2
        assert slices == [[{0}]] * half + [[{1}]] * half


def test_slices_that_the_data_axis_cannot_be_divided_by_are_refused():
    with pytest.raises(InputError, match="2 slices divide the data axis, and 1 is not a multiple"):
        make_mesh({"data": 1, "fsdp": 8}, [Chip(index) for index in range(8)])
