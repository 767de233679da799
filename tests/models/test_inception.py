"""FID's Inception-v3 against the original's outputs, and its weights from files as users have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from goldens.cases import golden, relative_error
from goldens.seeded import seeded_weights
from safetensors.numpy import save_file

from dit_jax import InceptionV3
from dit_jax.checkpoints.inception_layout import AXES, read_inception, their_name
from dit_jax.errors import InputError
from dit_jax.models.inception import abstract_inception, average_pool, resize


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """What `seeded.py` makes from the names and shapes, convolutions times sqrt(2)."""
    _, abstract = abstract_inception()
    shapes = {
        their_name(path): tuple(leaf.shape[axis] for axis in AXES[leaf.ndim])
        for path, leaf in flatten_dict(abstract).items()
    }
    return {
        name: array * np.float32(np.sqrt(2)) if array.ndim == 4 else array
        for name, array in seeded_weights(shapes).items()
    }


def same(params: dict, weights: dict[str, np.ndarray]) -> bool:
    flat = flatten_dict(params)
    return all(
        np.array_equal(np.transpose(leaf, AXES[leaf.ndim]), weights[their_name(path)]) for path, leaf in flat.items()
    )


def test_features_and_logits_are_the_originals(weights):
    with np.load("tests/goldens/inception_64.npz") as case:
        assert set(case["keys"]) == set(weights)
        outputs = jax.jit(InceptionV3.__call__)(InceptionV3.from_state_dict(weights), case["images"])
        assert {name: (a.shape, a.dtype) for name, a in outputs.items()} == {
            "pool": ((3, 2048), jnp.float32),
            "spatial": ((3, 2023), jnp.float32),
            "logits_unbiased": ((3, 1008), jnp.float32),
        }
        for name, output in outputs.items():
            assert relative_error(output, case[name]) < 2e-5, name


def test_resize_is_tensorflow_ones():
    case = golden("metrics")
    # golden() takes pictures for channels-first; these are not.
    before, after = (np.moveaxis(case[name], -1, 1) for name in ("resize_in", "resize_out"))
    assert np.abs(resize(before, 29, 17) - after).max() < 1e-6 * np.abs(after).max()
    assert np.array_equal(resize(before, *before.shape[1:3]), before)


def test_average_pools_leave_the_padding_out():
    assert np.allclose(average_pool(jnp.ones((1, 4, 5, 2))), 1)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 8, 8, 1), "uint8"), ((2, 8, 8, 3), "float32"), ((8, 8, 3), "uint8"), ((2, 3, 8, 8), "uint8")],
)
def test_other_pictures_are_refused(shape, dtype):
    with pytest.raises(InputError, match=r"expects \(batch, height, width, 3\) uint8"):
        jax.eval_shape(lambda x: InceptionV3()(x), jax.ShapeDtypeStruct(shape, dtype))


def test_products_are_float32_whatever_the_default():
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(lambda x: InceptionV3()(x))(jnp.zeros((1, 8, 8, 3), jnp.uint8))
    products = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(products) > 90
    highest = jax.lax.Precision.HIGHEST
    assert {eqn.params["precision"] for eqn in products} == {(highest, highest)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_files_are_read_whatever_training_left_in_them(tmp_path, weights, suffix):
    path = tmp_path / f"pt_inception-2015-12-05-6726825d{suffix}"
    more = {"AuxLogits.fc.bias": np.zeros(1000, np.float32)}
    if suffix == ".pth":
        tensors = {name: torch.from_numpy(array) for name, array in (weights | more).items()}
        torch.save(tensors | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}, path)
    else:
        save_file(weights | more, path)
    assert same(read_inception(path), weights)


def test_a_fetched_file_is_found_by_its_published_name(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"run python -m dit_jax\.download inception-fid"):
        read_inception("inception-fid")
    (tmp_path / "dit_jax").mkdir()
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save(tensors, tmp_path / "dit_jax" / "weights-inception-2015-12-05-6726825d.pth")
    assert same(read_inception("inception-fid"), weights)


def test_other_weights_are_refused_in_one_line(tmp_path, weights):
    changed = {
        "lacks fc.weight": {name: a for name, a in weights.items() if name != "fc.weight"},
        "holds Mixed_8a.conv.weight": weights | {"Mixed_8a.conv.weight": np.zeros(3, np.float32)},
        r"fc.weight has shape \(1000, 2048\) where \(1008, 2048\) is expected": weights
        | {"fc.weight": np.zeros((1000, 2048), np.float32)},
    }
    for told, tensors in changed.items():
        with pytest.raises(InputError, match=told):
            InceptionV3.from_state_dict(tensors)
    save_file({"fc.weight": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: the state dict lacks Conv2d_1a_3x3\.bn"):
        read_inception(tmp_path / "a.safetensors")
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04half")
    with pytest.raises(InputError, match=r"half\.pth is not a whole file"):
        read_inception(tmp_path / "half.pth")
    with pytest.raises(InputError, match="is no file of Inception's weights"):
        read_inception(tmp_path)
