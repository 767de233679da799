"""The official state dict, both ways."""

import dataclasses

import numpy as np
import pytest
import torch
from flax import nnx
from goldens.cases import TINY
from reference.dit import twin

from dit_jax import DiT, DiTConfig
from dit_jax.errors import InputError

ODD = dataclasses.replace(
    TINY, input_size=12, patch_size=4, in_channels=3, num_classes=17, learn_sigma=False, class_dropout_prob=0
)


@pytest.fixture
def weights():
    return DiT(TINY, rngs=nnx.Rngs(0)).to_state_dict()


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_pytorch_takes_our_state_dict_strictly_and_gives_it_back(config):
    network = twin(config)
    ours = DiT(config, rngs=nnx.Rngs(1)).to_state_dict()
    network.load_state_dict({name: torch.from_numpy(a) for name, a in ours.items()}, strict=True)
    assert list(network.state_dict()) == list(ours)
    back = DiT.from_state_dict(config, {name: a.numpy() for name, a in network.state_dict().items()}).to_state_dict()
    assert all(np.array_equal(ours[name], back[name]) for name in ours)


def test_xl_2_has_the_keys_of_the_released_file():
    from dit_jax.checkpoints.torch_layout import tensor_names

    assert len(tensor_names(DiTConfig.preset("DiT-XL/2"))) + 1 == 292


def test_positions_may_be_left_out_or_have_drifted(weights):
    weights["pos_embed"] = weights["pos_embed"] * np.float32(1 + 1e-5)
    assert np.array_equal(DiT.from_state_dict(TINY, weights).to_state_dict()["pos_embed"][0, 0, :16], np.zeros(16))
    del weights["pos_embed"]
    DiT.from_state_dict(TINY, weights)


def test_half_precision_weights_are_read_as_float32(weights):
    model = DiT.from_state_dict(TINY, {name: a.astype(np.float16) for name, a in weights.items()})
    assert {leaf.dtype.name for leaf in nnx.to_pure_dict(nnx.state(model))["x_embedder"]["proj"].values()} == {
        "float32"
    }


def refuses(weights, told, config=TINY):
    with pytest.raises(InputError, match=told):
        DiT.from_state_dict(config, weights)


def test_a_missing_name_is_refused(weights):
    del weights["blocks.1.mlp.fc2.bias"]
    refuses(weights, r"lacks blocks\.1\.mlp\.fc2\.bias")


def test_an_extra_name_is_refused(weights):
    weights["blocks.3.attn.qkv.weight"] = weights["blocks.2.attn.qkv.weight"]
    refuses(weights, r"holds blocks\.3\.attn\.qkv\.weight")


def test_another_shape_is_refused(weights):
    refuses(weights, "shape", dataclasses.replace(TINY, num_classes=1000))


def test_another_input_size_is_refused(weights):
    refuses(weights, "pos_embed has shape", dataclasses.replace(TINY, input_size=16))


def test_trained_positions_are_refused(weights):
    weights["pos_embed"] = weights["pos_embed"] + np.float32(0.1)
    refuses(weights, "fixed sin-cos table")
