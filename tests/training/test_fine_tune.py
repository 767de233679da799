"""A run that starts from weights: what it keeps, what it makes anew and says, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import seeded_dit
from ml_collections import ConfigDict

from dit_jax import DiTConfig, load_dit, save_dit
from dit_jax.config import base_config
from dit_jax.data.words import Words
from dit_jax.errors import InputError
from dit_jax.models.dit import abstract_dit
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training.fine_tune import first_state
from dit_jax.training.loop import train
from dit_jax.training.state import TrainState

NAMES = [str(label) for label in range(10)]


def a_config(**changes) -> ConfigDict:
    config = base_config()
    config.model.update(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=10)
    config.update_from_flattened_dict(changes)
    return config


def state_dict(config: ConfigDict, params: dict) -> dict[str, np.ndarray]:
    graph, _ = abstract_dit(DiTConfig(**config.model))
    return nnx.merge(graph, params).to_state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(folder with a.pt, a.safetensors, orbax/ of one model, its state dict)."""
    folder, model = tmp_path_factory.mktemp("weights"), seeded_dit(DiTConfig(**a_config().model))
    for name in ("a.pt", "a.safetensors", "orbax"):
        save_dit(model, folder / name)
    return folder, model.to_state_dict()


def start(path, mesh_shape=None, **changes) -> tuple[ConfigDict, TrainState]:
    config = a_config(init_from=str(path), **changes)
    mesh = make_mesh(mesh_shape, None if mesh_shape else jax.devices()[:1])
    with jax.set_mesh(mesh):
        return config, first_state(config, mesh, [str(label) for label in range(config.model.num_classes)])


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "orbax"])
def test_the_run_starts_with_the_weights_and_their_average(weights, name, capsys):
    folder, theirs = weights
    config, state = start(folder / name)
    for params in (state.params, state.ema):
        ours = state_dict(config, params)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert state.step == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.pt", "orbax"])
def test_weights_are_born_in_their_place_on_the_mesh(weights, name):
    _, state = start(weights[0] / name, dict(data=2, fsdp=2, tensor=2))
    kernel = state.ema["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_another_number_of_classes_gives_a_fresh_label_table_and_says_so(weights, capsys):
    folder, theirs = weights
    config, state = start(folder / "a.pt", **{"model.num_classes": 3})
    ours = state_dict(config, state.params)
    table = ours.pop("y_embedder.embedding_table.weight")
    assert table.shape == (4, 32) and 0.015 < table.std() < 0.025
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert "a fresh label table of 4 rows, not 11" in capsys.readouterr().err


def test_another_input_size_gives_new_positions_and_says_so(weights, capsys):
    config, state = start(weights[0] / "a.pt", **{"model.input_size": 16})
    assert state_dict(config, state.params)["pos_embed"].shape == (1, 64, 32)
    assert "positions for inputs of 16, not 8" in capsys.readouterr().err


def test_another_process_is_told(weights, capsys):
    start(weights[0] / "a.pt", **{"diffusion.schedule": "squaredcos_cap_v2"})
    assert "diffusion.schedule: 'linear' -> 'squaredcos_cap_v2'" in capsys.readouterr().err


CONTEXT = {"model.context_features": 27, "model.context_tokens": 16, "context": "words"}


@pytest.mark.parametrize("mesh", [None, dict(data=2, fsdp=2, tensor=2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("name", ["a.safetensors", "orbax"])
def test_a_model_that_is_given_a_context_begins_with_exactly_its_old_output(weights, name, mesh, capsys):
    folder, theirs = weights
    config, state = start(folder / name, mesh, **CONTEXT)
    assert "fresh modules for a context of 27 features, which it did not have" in capsys.readouterr().err
    context = Words(NAMES, 16).tokens(["three", "a five", "draw an eight"])
    x, t, y = np.random.default_rng(0).standard_normal((3, 8, 8, 4)), np.array([0, 500, 999]), np.array([3, 5, 10])
    before = load_dit(folder / name)
    after = nnx.merge(abstract_dit(DiTConfig(**config.model))[0], jax.tree.map(jnp.asarray, jax.device_get(state.ema)))
    np.testing.assert_array_equal(after(x, t, y, *context), before(x, t, y))
    ours = after.to_state_dict()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert ours["blocks.1.cross_attn.q.weight"].std() > 0.05 and ours["context_embedder.mlp.0.weight"].std() > 0.05


@pytest.mark.parametrize("kind", ["token", "condition"])
def test_a_model_that_is_given_gates_begins_with_exactly_its_old_output(weights, kind, capsys):
    config, state = start(weights[0] / "a.safetensors", **{"model.head_gate": kind})
    assert "fresh gates of heads, all open" in capsys.readouterr().err
    x, t, y = np.random.default_rng(0).standard_normal((2, 8, 8, 4), dtype=np.float32), np.array([3, 800]), np.arange(2)
    gated = nnx.merge(abstract_dit(DiTConfig(**config.model))[0], state.params)
    np.testing.assert_array_equal(jax.jit(gated)(x, t, y), jax.jit(load_dit(weights[0] / "a.safetensors"))(x, t, y))


def test_a_trained_model_goes_into_any_schedule_of_attention(weights, capsys):
    config, state = start(weights[0] / "orbax", **{"model.attention": "window:2*1,global*1"})
    assert "attention: global -> window:2*1,global*1" in capsys.readouterr().err
    x, t, y = np.random.default_rng(0).standard_normal((2, 8, 8, 4), dtype=np.float32), np.array([3, 800]), np.arange(2)
    started = nnx.merge(abstract_dit(DiTConfig(**config.model))[0], state.params)
    loaded = load_dit(weights[0] / "orbax", attention="window:2*1,global*1")
    np.testing.assert_array_equal(jax.jit(started)(x, t, y), jax.jit(loaded)(x, t, y))
    assert np.abs(jax.jit(loaded)(x, t, y) - jax.jit(load_dit(weights[0] / "orbax"))(x, t, y)).max() > 1e-3
    with pytest.raises(InputError, match="names 3 blocks and there are 2"):
        load_dit(weights[0] / "orbax", attention="window:2*3")


def test_weights_go_into_products_of_any_dtype(weights):
    x, t, y = np.random.default_rng(0).standard_normal((2, 8, 8, 4), dtype=np.float32), np.array([3, 800]), np.arange(2)
    mixed, plain = (load_dit(weights[0] / "orbax", dtype=dtype)(x, t, y) for dtype in ("bfloat16_operands", None))
    assert 0 < np.abs(mixed - plain).max() < 3e-2 * np.abs(plain).max()


def test_a_model_that_has_a_context_keeps_it(tmp_path):
    told = DiTConfig(**a_config(**CONTEXT).model)
    save_dit(seeded_dit(told), tmp_path / "told.safetensors")
    config, state = start(tmp_path / "told.safetensors", **CONTEXT)
    theirs = load_dit(tmp_path / "told.safetensors").to_state_dict()
    assert all(np.array_equal(value, theirs[key]) for key, value in state_dict(config, state.params).items())
    with pytest.raises(InputError, match="context_features=27 there, 0 here"):
        start(tmp_path / "told.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("patch_size", 4, "patch_size=2 there, 4 here"),
        ("hidden_size", 64, r"\(hidden_size=32 there, 64 here\)"),
        ("depth", 3, "depth=2 there, 3 here"),
        ("num_heads", 2, "num_heads=4 there, 2 here"),
        ("mlp_ratio", 2.0, "mlp_ratio=4.0 there, 2.0 here"),
        ("norm2_eps", 1e-5, "norm2_eps"),
        ("learn_sigma", False, "learn_sigma"),
    ],
)
def test_any_other_difference_is_refused(weights, field, value, told):
    with pytest.raises(InputError, match=told):
        start(weights[0] / "a.safetensors", **{f"model.{field}": value})


def test_weights_that_are_not_there_stop_the_run_before_it_leaves_a_checkpoint(tmp_path):
    config = a_config(init_from=str(tmp_path / "none.pt"), **{"data.source": "synthetic:8", "batch_size": 8})
    config.model.update(in_channels=3, num_classes=1000)
    with pytest.raises(InputError, match="nothing of that name"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
