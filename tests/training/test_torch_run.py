"""A run moved between PyTorch and here goes on as if it had stayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from reference.dit import twin
from reference.training import Trainer, training_args

from dit_jax import DiT, DiTConfig, GaussianDiffusion
from dit_jax.checkpoints.store import CheckpointStore
from dit_jax.config import base_config
from dit_jax.errors import InputError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training import resume
from dit_jax.training.state import TrainState, init_state
from dit_jax.training.step import Examples, make_update
from dit_jax.training.torch_run import export_run, import_run

BEFORE, AFTER = 5, 20


@pytest.fixture
def config() -> ConfigDict:
    config = base_config()
    config.model.update(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=10)
    config.optimizer.learning_rate = 1e-3
    config.ema_decay = 0.99
    return config


@pytest.fixture
def update(config):
    return jax.jit(make_update(config, GaussianDiffusion.create()))


def draws(step: int) -> dict[str, np.ndarray]:
    """What a step needs, NCHW: the same for both sides."""
    rng = np.random.default_rng(step)
    x0, noise = rng.standard_normal((2, 8, 4, 8, 8), dtype=np.float32)
    return {
        "x0": x0,
        "y": rng.integers(0, 10, 8),
        "t": rng.integers(0, 1000, 8),
        "noise": noise,
        "dropped": rng.random(8) < 0.1,
    }


def train_here(state: TrainState, update, steps: range) -> tuple[TrainState, list[float]]:
    losses = []
    for step in steps:
        d = draws(step)
        x, noise = (np.moveaxis(d[name], 1, -1) for name in ("x0", "noise"))
        y = np.where(d["dropped"], 10, d["y"])
        state, metrics = update(state, Examples(x, jnp.asarray(y), jnp.asarray(d["t"]), noise))
        losses.append(float(metrics["loss"]))
    return state, losses


def train_there(trainer: Trainer, steps: range) -> list[float]:
    return [trainer.step(**draws(step))["loss"] for step in steps]


def restored(workdir, config) -> tuple[int, TrainState]:
    mesh = make_mesh(devices=jax.devices()[:1])
    store = CheckpointStore(workdir / "checkpoints")
    step, state, _ = resume.restore(store, config, mesh)
    store.close()
    return step, state


def test_pytorch_goes_on_from_our_run(tmp_path, config, update):
    state = init_state(config, make_mesh(devices=jax.devices()[:1]))
    state, _ = train_here(state, update, range(BEFORE))
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    resume.save(store, BEFORE, state, config, [str(i) for i in range(10)])
    store.close()
    assert export_run(tmp_path / "run", tmp_path / "run.pt") == BEFORE
    trainer = Trainer(twin(DiTConfig(**config.model)), lr=1.0, ema_decay=0.99)
    trainer.load(tmp_path / "run.pt")
    state, ours = train_here(state, update, range(BEFORE, BEFORE + AFTER))
    theirs = train_there(trainer, range(BEFORE, BEFORE + AFTER))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert len(ours) == AFTER


def test_we_go_on_from_a_run_of_pytorch(tmp_path, config, update):
    model = DiT.from_state_dict(DiTConfig(**config.model), perturbed(config))
    trainer = Trainer(twin(model.config), lr=1e-3, ema_decay=0.99)
    trainer.model.load_state_dict(as_tensors(model.to_state_dict()))
    trainer.ema.load_state_dict(as_tensors(model.to_state_dict()))
    train_there(trainer, range(BEFORE))
    trainer.save(tmp_path / "0000005.pt", training_args(global_batch_size=8, global_seed=3))
    assert import_run(tmp_path / "0000005.pt", tmp_path / "run", num_heads=4) == BEFORE
    step, state = restored(tmp_path / "run", config)
    assert step == BEFORE
    _, ours = train_here(state, update, range(BEFORE, BEFORE + AFTER))
    theirs = train_there(trainer, range(BEFORE, BEFORE + AFTER))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_there_and_back_is_bit_exact_and_keeps_the_config(tmp_path, config, update):
    state, _ = train_here(init_state(config, make_mesh(devices=jax.devices()[:1])), update, range(3))
    store = CheckpointStore(tmp_path / "a" / "checkpoints")
    resume.save(store, 3, state, config, list("abcdefghij"))
    store.close()
    export_run(tmp_path / "a", tmp_path / "a.pt")
    import_run(tmp_path / "a.pt", tmp_path / "b")
    step, back = restored(tmp_path / "b", config)
    assert step == 3
    assert jax.tree.all(jax.tree.map(lambda one, other: bool((one == other).all()), state, back))
    kept = []
    store = CheckpointStore(tmp_path / "b" / "checkpoints", write=False)
    store.restore_newest(lambda record: kept.append(record) or {})
    store.close()
    assert kept[0]["config"]["optimizer"]["learning_rate"] == 1e-3 and kept[0]["class_names"] == list("abcdefghij")
    assert kept[0]["source"] == "a.pt" and len(kept[0]["sha256"]) == 64


def test_settings_that_the_file_tells_become_the_config(tmp_path, config):
    trainer = Trainer(twin(DiTConfig(**config.model)), lr=3e-4)
    train_there(trainer, range(1))
    trainer.save(tmp_path / "1.pt", training_args(global_batch_size=8, global_seed=3))
    import_run(tmp_path / "1.pt", tmp_path / "run", num_heads=4)
    store, kept = CheckpointStore(tmp_path / "run" / "checkpoints", write=False), []
    store.restore_newest(lambda record: kept.append(record["config"]) or {})
    store.close()
    assert (kept[0]["batch_size"], kept[0]["seed"], kept[0]["optimizer"]["learning_rate"]) == (8, 3, 3e-4)


def test_moments_of_another_optimiser_are_refused(tmp_path, config):
    trainer = Trainer(twin(DiTConfig(**config.model)))
    trainer.opt = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    train_there(trainer, range(1))
    trainer.save(tmp_path / "1.pt")
    with pytest.raises(InputError, match="not the state of AdamW"):
        import_run(tmp_path / "1.pt", tmp_path / "run", num_heads=4)
    assert not (tmp_path / "run").exists()


def perturbed(config) -> dict[str, np.ndarray]:
    """Weights that are not zero anywhere, unlike those of a new network."""
    rng = np.random.default_rng(0)
    weights = DiT(DiTConfig(**config.model), rngs=nnx.Rngs(0)).to_state_dict()
    moved = {name: a + rng.normal(0, 0.02, a.shape).astype(np.float32) for name, a in weights.items()}
    return moved | {"pos_embed": weights["pos_embed"]}


def as_tensors(weights):
    return {name: torch.from_numpy(a) for name, a in weights.items()}
