"""Programs of a network with a context, lowered from a config as they will be run."""

import pytest
from ml_collections import ConfigDict

from dit_jax.compilation.programs import lower
from dit_jax.config import base_config
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
