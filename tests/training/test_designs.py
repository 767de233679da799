"""The paper's four blocks, and words, learn; a network told by words is resumed, drawn from and moved like any."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dit_jax.checkpoints.files import open_weights, write_weights
from dit_jax.config import CHOICES, DiTConfig, base_config
from dit_jax.data.words import open_context
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.sharding import batch_sharding
from dit_jax.sampling.generate import image_keys, make_generate
from dit_jax.training.loop import train
from dit_jax.training.state import init_state
from dit_jax.training.step import make_train_step

WORDS = {"context": "words", "model.num_classes": 1, "model.context_features": 27, "model.context_tokens": 16}
RUNS = {block: {"model.block": block} for block in CHOICES["block"]} | {"words": WORDS}


def config_of(**changes) -> ConfigDict:
    config = base_config()
    config.update(steps=8, batch_size=16, ema_decay=0.9, log_every=4)
    config.data.update(source="digits", threads=1, flip=False)
    config.model.update(input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=2, num_heads=2)
    config.optimizer.learning_rate = 1e-2
    config.mesh.update(data=1)
    config.checkpoint.every = 4
    config.preview.update(every=0, count=12)
    config.sample.update(sampler="ddim", steps=3, guidance=2.0)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *args, devices=jax.devices: devices(*args)[:1])


def test_a_run_told_by_words_resumes_bit_exactly_draws_and_becomes_a_file(tmp_path):
    train(config_of(**WORDS), tmp_path / "unbroken")
    train(config_of(**WORDS, steps=4), tmp_path / "run")
    train(config_of(**WORDS, **{"preview.every": 8}), tmp_path / "run")
    assert (tmp_path / "run" / "previews" / "0000008.png").is_file()
    unbroken, params = (open_weights(tmp_path / name).params() for name in ("unbroken", "run"))
    jax.tree.map(np.testing.assert_array_equal, unbroken, params)

    opened = open_weights(tmp_path / "run")
    write_weights(tmp_path / "a.safetensors", opened.record, opened.leaves)
    there = open_weights(tmp_path / "a.safetensors")
    record, moved = there.record, there.params()
    jax.tree.map(np.testing.assert_array_equal, moved, params)
    assert record.class_names == list(map(str, range(10))) and record.context == "words"

    words, labels = open_context(record.context, record.class_names, record.model), np.arange(6, dtype=np.int32)
    generate = make_generate(record.model, record.diffusion, **record.sample)

    def draw(labels: np.ndarray) -> np.ndarray:
        told = words.tokens(words.in_turn(labels))
        return np.asarray(generate(moved, labels, image_keys(0, 0, 6), *told))

    assert (draw(labels) != draw(labels[::-1])).any(), "the words are of no consequence"


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_batch_is_learnt(changes):
    config = config_of(**changes, **{"optimizer.learning_rate": 3e-3})
    mesh, y = make_mesh(config.mesh), np.arange(16, dtype=np.int32) % 10
    batch = {"x": np.random.default_rng(0).standard_normal((10, 8, 8, 1), dtype=np.float32)[y], "y": y}
    words = open_context(config.context, list(map(str, range(10))), DiTConfig(**config.model))
    if words:
        batch |= zip(("context", "context_mask"), words.tokens(words.in_turn(y)), strict=True)
    with jax.set_mesh(mesh):
        state, step = init_state(config, mesh), make_train_step(config, mesh)
        batch = jax.device_put(batch, batch_sharding(mesh))
        losses = []
        for _ in range(100):
            state, metrics = step(state, batch)
            losses.append(float(metrics["mse"]))
    assert losses[0] == pytest.approx(1, abs=0.1) and np.mean(losses[-20:]) < 0.8
