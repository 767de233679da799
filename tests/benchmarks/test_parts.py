"""The benchmark runs what training and sampling would run, and its rates are images by seconds and devices."""

import jax
import pytest

from dit_jax.benchmarks import parts, rates
from dit_jax.config import DiTConfig, base_config
from dit_jax.training.flops import forward_macs, train_flops


def small_config():
    c = base_config()
    c.batch_size = 8
    c.model.update(input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10)
    c.sample.update(steps=2, guidance=1.0)
    return c


def test_a_rate_is_images_by_the_seconds_of_a_run_and_the_first_run_does_not_count(monkeypatch):
    clock, seconds = [100.0], {"fast": iter([50, 1, 4, 2]), "slow": iter([50, 10, 10, 5])}
    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock[0])

    def advance(name):
        clock[0] += next(seconds[name])

    runs = {name: lambda name=name: advance(name) for name in seconds}
    fast, slow = rates.in_turn(runs, 40, repeats=3)
    assert fast == {"name": "fast", "median": 20, "lowest": 10, "highest": 40}
    assert slow == {"name": "slow", "median": 4, "lowest": 4, "highest": 8}


def test_utilisation_counts_the_devices_that_a_part_runs_on(monkeypatch):
    monkeypatch.setattr(rates, "peak_flops", lambda device: 1e9)
    c = small_config()
    model = DiTConfig(**c.model)
    (train,), (sample,), (forward,) = parts.train(c, 1, None), parts.sample(c, 1, None, None), parts.forward(c, 1, None)
    (beside, _) = parts.sample(c, 1, None, "diffusers")
    macs, devices = forward_macs(model), jax.device_count()
    assert devices > 1
    assert train["mfu"] == pytest.approx(train["median"] * train_flops(model) / (devices * 1e9))
    assert sample["mfu"] == pytest.approx(sample["median"] * 4 * macs / (devices * 1e9))
    for row, passes in ((forward, 1), (beside, 2)):  # on one
        assert row["mfu"] == pytest.approx(row["median"] * 2 * passes * macs / 1e9)


def test_a_model_with_a_context_is_measured(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *args, devices=jax.devices: devices(*args)[:1])
    c = small_config()
    c.update(batch_size=4, context="words")
    c.data.update(source="digits", threads=1)
    c.model.update(num_classes=1, context_features=27, context_tokens=16)
    c.sample.guidance = 2.0
    (train,), (sample,), (forward,) = parts.train(c, 1, None), parts.sample(c, 1, None, None), parts.forward(c, 1, None)
    (data,) = parts.data(c, 1)
    assert min(row["median"] for row in (train, sample, forward, data)) > 0
    assert parts.examples(DiTConfig(**c.model), 4)["context"].shape == (4, 16, 27)
