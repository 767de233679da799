"""The network beside a PyTorch twin of its own: outputs and gradients, for shapes that the golden cases lack."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from goldens.cases import TINY, relative_error
from goldens.seeded import seeded_weights
from reference.dit import twin

from dit_jax import DiT
from dit_jax.models.dit import abstract_dit


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, num_classes=1, class_dropout_prob=0, learn_sigma=False),
        dataclasses.replace(TINY, input_size=9, patch_size=3, in_channels=1, num_classes=17, mlp_ratio=2.5),
        dataclasses.replace(TINY, context_features=6, context_tokens=5),
        dataclasses.replace(TINY, block="adaLN"),
        dataclasses.replace(TINY, block="cross-attention"),
        dataclasses.replace(TINY, block="cross-attention", context_features=6, context_tokens=5),
        dataclasses.replace(TINY, block="in-context"),
    ],
)
def test_output_and_gradients_are_those_of_the_pytorch_twin(config):
    network = twin(config)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if name != "pos_embed"}
    weights = seeded_weights(shapes)
    network.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()}, strict=False)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, config.in_channels, config.input_size, config.input_size), dtype=np.float32)
    t, y = np.array([0, 400, 999]), np.array([0, 1, 2]) % config.num_classes
    context = ()
    if config.context_features:
        context = (rng.standard_normal((3, 5, 6), dtype=np.float32), np.arange(5) < np.array([[1], [5], [3]]))
    theirs = network(*map(torch.from_numpy, (x, t, y, *context)))
    theirs.square().sum().backward()

    def loss(model):
        out = model(np.moveaxis(x, 1, -1), t, y, *context)
        return jnp.square(out).sum(), out

    grads, ours = nnx.grad(loss, has_aux=True)(DiT.from_state_dict(config, weights))
    assert relative_error(ours, np.moveaxis(theirs.detach().numpy(), 1, -1)) < 5e-6
    graph, _ = abstract_dit(config)
    for name, ours in nnx.merge(graph, nnx.to_pure_dict(grads)).to_state_dict().items():
        theirs = dict(network.named_parameters())[name].grad
        if name != "pos_embed" and "qkv.bias" not in name:  # a key's bias has no gradient but rounding
            assert relative_error(ours, theirs.numpy()) < 2e-5, name
