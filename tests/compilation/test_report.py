"""Reports on real programs: products as analysis says, talk near the least possible, bisection that finds the limit."""

import dataclasses

import pytest

from dit_jax.compilation import report
from dit_jax.config import DiTConfig, base_config
from dit_jax.errors import InputError
from dit_jax.parallel import chips
from dit_jax.parallel.mesh import make_mesh


def small_config():
    config = base_config()
    config.batch_size = 16
    config.data.source = "latents:nowhere"
    model = DiTConfig(input_size=8, hidden_size=64, depth=3, num_heads=4, num_classes=10, dtype="float32")
    config.model.update(dataclasses.asdict(model))
    return config


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_a_training_step_computes_what_analysis_says_and_sends_little_more_than_it_must(shape):
    config = small_config()
    row = report.measure("train", config, make_mesh(shape), None)
    assert row["fits"] and row["flops"]["compiled"] == pytest.approx(row["flops"]["analytic"], rel=0.05)
    sent = sum(kind["bytes"] for kind in row["collectives"].values())
    assert sent < 2.5 * sum(row["collectives_minimum"].values())
    assert row["traffic"] > 0 and row["memory"]["live"] > 0


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "tensor": 4}])
def test_sums_over_data_and_tensor_are_within_a_tenth_of_the_least(shape):
    row = report.measure("train", small_config(), make_mesh(shape), None)
    least = row["collectives_minimum"]["all-reduce"]
    assert least <= row["collectives"]["all-reduce"]["bytes"] < 1.1 * least


def test_recomputation_shows_as_more_products():
    rows = []
    for remat in ("none", "full"):
        config = small_config()
        config.model.remat = remat
        rows.append(report.measure("train", config, make_mesh({"data": 8}), None)["flops"]["compiled"])
    assert 1.2 < rows[1] / rows[0] < 1.4


def test_weights_that_are_kept_are_gathered_once():
    gathers = {}
    for remat in ("none", "full"):
        config = small_config()
        config.model.remat = remat
        row = report.measure("train", config, make_mesh({"fsdp": 8}), None)
        gathers[remat] = row["collectives"]["all-gather"]["bytes"], row["collectives_minimum"]["all-gather"]
    assert gathers["full"][1] == 2 * gathers["none"][1]
    assert gathers["full"][0] == pytest.approx(2 * gathers["none"][0], rel=0.25)


def test_sampling_counts_every_step_and_both_halves_of_guidance():
    config = small_config()
    config.data.source = "digits"  # pixels: nothing to decode
    config.sample.steps = 5
    row = report.measure("sample", config, make_mesh({"data": 8}), None)
    assert row["flops"]["compiled"] == pytest.approx(row["flops"]["analytic"], rel=0.05)


@pytest.mark.parametrize("what", ["train", "sample", "encode"])
def test_the_autoencoder_within_the_program_counts(what):
    config = small_config()
    config.latents, config.sample.steps = "on_the_fly", 5
    flops = report.measure(what, config, make_mesh({"data": 8}), None)["flops"]
    assert flops["compiled"] == pytest.approx(flops["analytic"], rel=0.01)


def test_outside_the_guidance_interval_the_second_half_costs_nothing():
    counts = {}
    for interval in ((), (0.3, 3.0)):
        config = small_config()
        config.data.source = "digits"
        config.sample.steps, config.sample.guidance_interval = 10, interval
        flops = report.measure("sample", config, make_mesh({"data": 8}), None)["flops"]
        assert flops["compiled"] == pytest.approx(flops["analytic"], rel=0.05)
        counts[interval] = flops["analytic"]
    guided = 4  # of ten steps
    assert counts[(0.3, 3.0)] == pytest.approx(counts[()] * (10 + guided) / 20)


@pytest.mark.parametrize("start", [1, 3, 16])
@pytest.mark.parametrize("limit", [0, 1, 2, 3, 13, 16, 100])
def test_the_largest_batch_is_found_within_an_eighth(limit, start):
    asked = []
    found = report.largest_batch(lambda images: asked.append(images) or images <= limit, start)
    assert found <= limit < max(1, found * 1.125) + 1
    assert len(asked) == len(set(asked)), "each is compiled once"


def test_a_chip_too_small_does_not_fit_and_the_estimate_is_bound_by_its_slowest_part():
    tiny = chips.Chip("x", flops=1e12, memory=1e3, bandwidth=1e3, links=1e12)
    row = report.measure("train", small_config(), make_mesh({"data": 8}), tiny)
    assert not row["fits"] and row["estimate"]["bound_by"] == "memory"
    assert row["estimate"]["seconds"] == pytest.approx(row["traffic"] / 1e3)
    assert "no" in report.table([row]) and report.best([row]) is None


def test_float32_takes_what_the_chip_needs_for_it():
    config = small_config()
    row = report.measure("encode", config, make_mesh({"data": 8}), chips.CHIPS["h100"])
    assert row["estimate"]["parts"]["compute"] == pytest.approx(row["flops"]["compiled"] / 67e12)
    slower = {name: chips.CHIPS["v5e"].slowdown(name) for name in ("narrow", "default", "high", "highest")}
    assert slower == {"narrow": 1, "default": 1, "high": 3, "highest": 6}
    assert chips.CHIPS["a100"].slowdown("default") == chips.CHIPS["a100"].slowdown("high") == 2


def row_of(batch_size: int, compute: float, memory: float, fits: bool = True) -> dict:
    return {"fits": fits, "batch_size": batch_size, "estimate": {"parts": {"compute": compute, "memory": memory}}}


def test_the_best_takes_least_an_image_and_of_those_alike_least_altogether():
    slow, fast = row_of(8, compute=2.0, memory=1.0), row_of(16, compute=2.0, memory=1.0)
    assert report.best([slow, fast, row_of(16, 1.0, 1.0, fits=False), {"fits": True}]) is fast
    alike, less = row_of(8, compute=1.999, memory=1.9), row_of(8, compute=2.0, memory=1.0)
    assert report.best([alike, less]) is less
    faster, cheaper = row_of(8, compute=1.9, memory=1.9), row_of(8, compute=2.0, memory=1.0)
    assert report.best([faster, cheaper]) is faster
    assert report.best([]) is None


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:0x4", "0*v5e:4x4", "h100:2x2", "cpu", "cpu:0", "2*cpu:4"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(InputError, match="expected one such as"):
        chips.prepare(name)


def test_of_a_gpus_memory_jax_takes_a_part(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert chips.usable_memory(chips.CHIPS["h100"], "gpu") == 60e9
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".9")
    assert chips.usable_memory(chips.CHIPS["h100"], "gpu") == 72e9
    assert chips.usable_memory(chips.CHIPS["v4"], "tpu") == 32 * 2**30
