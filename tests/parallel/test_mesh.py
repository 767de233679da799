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
