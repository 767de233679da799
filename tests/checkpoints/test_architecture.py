"""The architecture that shapes tell, and what is asked for where they do not."""

import dataclasses

import pytest
import torch
from checkpoints.test_torch_layout import ODD
from goldens.cases import TINY
from reference.dit import twin

from dit_jax import DiTConfig
from dit_jax.checkpoints.architecture import infer
from dit_jax.config import PRESETS
from dit_jax.errors import InputError


def shapes(config: DiTConfig, **changed: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """Of the PyTorch network's state dict, none of which takes memory; `changed` ones, without those set to None."""
    with torch.device("meta"):
        state_dict = twin(config).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()} | changed
    return {name: shape for name, shape in found.items() if shape is not None}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_shapes_alone(name):
    assert infer(shapes(DiTConfig.preset(name))) == DiTConfig.preset(name)


@pytest.mark.parametrize(
    "fields",
    [{"input_size": 64}, {"learn_sigma": False}, {"in_channels": 3}, {"num_classes": 17}, {"num_classes": 1}],
    ids=str,
)
def test_a_preset_of_other_data_is_known_too(fields):
    config = DiTConfig.preset("DiT-S/4", **fields)
    assert infer(shapes(config)) == config


def test_no_null_class_takes_the_number_of_classes():
    assert infer(shapes(ODD), num_heads=4, num_classes=17) == ODD
    taken = infer(shapes(ODD), num_heads=4)
    assert taken.num_classes == 16 and taken.class_dropout_prob > 0


def test_one_label_row_is_an_unconditional_model():
    config = dataclasses.replace(TINY, num_classes=1, class_dropout_prob=0.0)
    assert infer(shapes(config), num_heads=4) == config


def test_heads_are_asked_for_unless_the_paper_has_this_depth_and_width():
    with pytest.raises(InputError, match=r"depth 3 and width 64.*--num_heads"):
        infer(shapes(TINY))
    assert infer(shapes(TINY), num_heads=8).num_heads == 8


def test_given_heads_go_before_the_paper_s():
    config = DiTConfig.preset("DiT-S/4", num_heads=12)
    assert infer(shapes(config), num_heads=12) == config


def test_the_size_of_the_input_is_asked_for_where_positions_are_left_out():
    without = shapes(TINY, pos_embed=None)
    with pytest.raises(InputError, match="--input_size"):
        infer(without, num_heads=4)
    assert infer(without, num_heads=4, input_size=8) == TINY


@pytest.mark.parametrize("hidden_size", [12, 44, 96, 196])
def test_every_width_of_the_mlp_is_kept_whatever_its_ratio_in_floating_point(hidden_size):
    plain = shapes(dataclasses.replace(TINY, hidden_size=hidden_size))
    for width in range(1, 5 * hidden_size):
        plain["blocks.0.mlp.fc1.weight"] = (width, hidden_size)
        assert infer(plain, num_heads=4).mlp_width == width


def test_other_networks_are_refused():
    with pytest.raises(InputError, match=r"not the weights of a DiT.*conv_in\.bias"):
        infer({"conv_in.weight": (128, 3, 3, 3), "conv_in.bias": (128,)})
    with pytest.raises(InputError, match="not the weights of a DiT"):
        infer(shapes(TINY, **{"x_embedder.proj.weight": (64, 16)}), num_heads=4)
    with pytest.raises(InputError, match="an axis of length 0"):
        infer(shapes(TINY, **{"x_embedder.proj.weight": (64, 4, 0, 0)}), num_heads=4)
    with pytest.raises(InputError, match="not those of 1000000000000 blocks"):
        infer(shapes(TINY, **{"blocks.999999999999.attn.qkv.bias": (3,)}), num_heads=4)
    with pytest.raises(InputError, match=r"12 channels of .*'s 4"):
        infer(shapes(TINY, **{"final_layer.linear.weight": (48, 64)}), num_heads=4)
