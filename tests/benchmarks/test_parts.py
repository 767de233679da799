"""The benchmark runs what training and sampling would run, condition tokens and all."""

import jax

from dit_jax.benchmarks import parts
from dit_jax.config import DiTConfig, base_config


def test_a_model_with_a_context_is_measured(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *args, devices=jax.devices: devices(*args)[:1])
    c = base_config()
    c.update(batch_size=4, context="words")
    c.data.update(source="digits", threads=1)
    c.model.update(input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=1)
    c.model.update(context_features=27, context_tokens=16)
    c.sample.steps = 2
    (train,), (sample,), (forward,) = parts.train(c, 1, None), parts.sample(c, 1, None, None), parts.forward(c, 1, None)
    (data,) = parts.data(c, 1)
    assert min(row["median"] for row in (train, sample, forward, data)) > 0
    assert parts.examples(DiTConfig(**c.model), 4)["context"].shape == (4, 16, 27)
