"""Programs of a network with a context, lowered from a config as they will be run."""

from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from dit_jax.compilation.programs import lower, resolve
from dit_jax.config import DiTConfig, base_config
from dit_jax.parallel.mesh import make_mesh


def config_of(features: int, tokens: int) -> ConfigDict:
    config = base_config()
    config.batch_size, config.sample.steps = 16, 2
    config.model.update(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    config.model.update(context_features=features, context_tokens=tokens)
    return config


@pytest.mark.parametrize("what", ["train", "sample"])
def test_only_a_model_with_a_context_is_given_tokens(what):
    mesh = make_mesh({"data": 4, "fsdp": 2})
    assert "tensor<16x5x7xf32>" in lower(what, config_of(7, 5), mesh).as_text()
    assert "x5x7xf32>" not in lower(what, config_of(0, 0), mesh).as_text()


TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")


@pytest.mark.parametrize(
    ("what", "device", "settled"),
    [
        ("train", TPU, ("bfloat16", "xla", "dots", 1)),
        ("train", GPU, ("bfloat16", "cudnn", "dots", 3)),
        ("train", SimpleNamespace(platform="cpu"), ("float32", "xla", "none", 3)),
        ("sample", GPU, ("bfloat16", "cudnn", "dots", 0)),
    ],
)
def test_auto_is_settled_for_where_the_program_will_run(what, device, settled):
    fields, config = ("dtype", "attention_kernel", "remat", "unroll"), config_of(0, 0)
    config.model.depth = 3
    resolve(what, config, device)
    assert tuple(config.model[field] for field in fields) == settled
    resolve(what, config, TPU)  # what is settled stays
    assert tuple(config.model[field] for field in fields[:3]) == settled[:3]


@pytest.mark.parametrize(
    ("kind", "side", "kernel"),
    [
        ("TPU v5 lite", 16, "xla"),  # 64 tokens
        ("TPU v5 lite", 128, "flash"),
        ("TPU v4", 96, "flash"),  # a head at a time
        ("TPU v4", 128, "xla"),  # no room for 4,096 scores of 256 queries
        ("TPU v3", 32, "xla"),  # it multiplies no bfloat16 in kernels
    ],
)
def test_the_tpu_kernel_is_taken_where_it_has_room(kind, side, kernel):
    config = DiTConfig.preset("DiT-XL/2", input_size=side)
    assert config.resolved(SimpleNamespace(platform="tpu", device_kind=kind)).attention_kernel == kernel


def test_training_unrolls_the_blocks_where_that_is_faster_and_drawing_does_not():
    def loops(what: str, unroll: int) -> int:
        config = config_of(0, 0)
        config.model.update(depth=3, unroll=unroll)
        return lower(what, config, make_mesh({"data": 4, "fsdp": 2})).as_text().count("stablehlo.while")

    assert loops("train", 1) - loops("train", 0) == 2  # forward and backward; others are those of random numbers
    assert loops("sample", 1) == loops("sample", 0)
