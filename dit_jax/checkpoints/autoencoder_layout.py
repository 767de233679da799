"""The autoencoder under the names and shapes of diffusers' state dict, in a file or a folder, and back."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.checkpoints.diffusers_layout import WEIGHTS
from dit_jax.checkpoints.files import find, format_of
from dit_jax.checkpoints.tensor_files import PICKLES, SAFETENSORS, check_shapes, read_tensors, write_tensors
from dit_jax.errors import InputError
from dit_jax.files import read_json, replacing_folder, write_json
from dit_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL, abstract_autoencoder
from dit_jax.models.decoding import TILE

CLASS_NAME = "AutoencoderKL"
CONFIG = "autoencoder"
"""Under this name the record in a file that we wrote holds the config."""

# Modules have the same names here and there. A parameter of ours, its name there and the order of our axes there: by
# number of axes, as torch.nn.Conv2d keeps (out, in, height, width) and torch.nn.Linear (out, in).
PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}

# How files of 2022 spell the attention's matrices, which some of them keep as 1x1 convolutions.
SPELLING_OF_2022 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# What diffusers takes where its config.json is silent, and what it must not say otherwise.
DEFAULTS = {"block_out_channels": (64,), "layers_per_block": 1}
FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
KINDS = {tuple: list, float: int | float}  # as JSON has them
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def load_autoencoder(path: str | Path, **known: Any) -> AutoencoderKL:
    """The autoencoder in a file or folder, as `read_autoencoder` finds it."""
    config, params = read_autoencoder(path, **known)
    graph, _ = abstract_autoencoder(config)
    return nnx.merge(graph, params)


def read_autoencoder(path: str | Path, **known: Any) -> tuple[AutoencoderConfig, dict]:
    """The config and the parameters, as `abstract_autoencoder` has them, of an autoencoder.

    Args:
        path: a folder of diffusers, of the autoencoder or of a whole pipeline; a .safetensors, .bin or .pt file; or a
            name that `dit_jax.download` has fetched.
        known: fields of AutoencoderConfig, in place of what is found. Tensors alone do not tell scaling_factor,
            shift_factor and norm_num_groups: from a file that neither diffusers nor we wrote they are 0.18215, 0 and
            the greatest common divisor of 32 and the widths.

    Raises InputError if there is no such thing, it is damaged, or it is not such an autoencoder.
    """
    path = find(path)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        fields = _read_config(folder / "config.json")
        files = [folder / (WEIGHTS + suffix) for suffix in (SAFETENSORS, ".bin")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise InputError(f"{folder} has neither {files[0].name} nor {files[1].name}")
        tensors, _ = read_tensors(file)
    elif path.suffix in (SAFETENSORS, *PICKLES):
        file, beside = path, path.with_name("config.json")
        tensors, record = read_tensors(file)
        fields = record.get(CONFIG, {})
        if not fields and path.stem == WEIGHTS and beside.is_file():
            fields = _read_config(beside)
    else:
        raise InputError(f"{path} has no suffix of weights: expected {', '.join((SAFETENSORS, *PICKLES))}, or a folder")
    try:
        if not fields:
            fields = infer({name: array.shape for name, array in respelled(tensors).items()})
        config = AutoencoderConfig(**(fields | known))
        return config, to_params(config, tensors)
    except TypeError as error:
        raise InputError(f"{file}: not the fields of an AutoencoderConfig: {error}") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def save_autoencoder(vae: AutoencoderKL, path: str | Path) -> None:
    """Write an autoencoder: `.pt` and `.safetensors`, with the config in their metadata, or `diffusers:FOLDER` for
    `diffusers.AutoencoderKL.from_pretrained`. Raises InputError if it cannot be written."""
    tensors, fields = to_state_dict(vae), dataclasses.asdict(vae.config)
    written = format_of(path)
    if written == "diffusers":
        with replacing_folder(str(path).removeprefix("diffusers:")) as temporary:
            write_tensors(temporary / (WEIGHTS + SAFETENSORS), tensors, {CONFIG: fields})
            write_json(temporary / "config.json", diffusers_config(vae.config))
    elif written in ("pytorch", "safetensors"):
        write_tensors(Path(path), tensors, {CONFIG: fields})
    else:
        raise InputError(f"{path}: an autoencoder is written as .safetensors, .pt or diffusers:FOLDER")


def from_state_dict(config: AutoencoderConfig, state_dict: Mapping[str, np.ndarray]) -> AutoencoderKL:
    """An autoencoder with the given weights, as float32. Raises InputError as `to_params` does."""
    graph, _ = abstract_autoencoder(config)
    return nnx.merge(graph, to_params(config, state_dict))


def to_state_dict(vae: AutoencoderKL) -> dict[str, np.ndarray]:
    """The weights as float32 arrays under diffusers' names of today."""
    params = flatten_dict(nnx.to_pure_dict(nnx.state(vae, nnx.Param)))
    return {their_name(path): np.array(to_torch(np.asarray(leaf)), order="C") for path, leaf in params.items()}


def to_params(config: AutoencoderConfig, state_dict: Mapping[str, np.ndarray]) -> dict:
    """The parameters, as `abstract_autoencoder` has them, from a state dict in either spelling.

    Raises InputError, naming the tensors, if one is missing, extra or of another shape.
    """
    tensors = respelled(state_dict)
    _, abstract = abstract_autoencoder(config)
    leaves = flatten_dict(abstract)
    expected = {their_name(path): tuple(leaf.shape[axis] for axis in AXES[leaf.ndim]) for path, leaf in leaves.items()}
    check_shapes(describe(config), expected, {name: array.shape for name, array in tensors.items()})
    return unflatten_dict({path: jnp.asarray(from_torch(tensors[their_name(path)]), jnp.float32) for path in leaves})


def their_name(path: tuple[str | int, ...]) -> str:
    """The name there of a parameter of ours, such as `encoder.down_blocks.0.resnets.1.conv1.weight`."""
    *modules, parameter = path
    return ".".join([*map(str, modules), PARAMETERS[parameter]])


def to_torch(ours: np.ndarray) -> np.ndarray:
    return ours.transpose(AXES[ours.ndim])


def from_torch(theirs: np.ndarray) -> np.ndarray:
    return theirs.transpose(np.argsort(AXES[theirs.ndim]))


def respelled(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict with the attention's matrices spelled, and shaped, as diffusers does today."""
    tensors = {}
    for name, array in state_dict.items():
        block, attention, matrix = name.partition(".attentions.0.")
        module, _, parameter = matrix.rpartition(".")
        if module and module != "group_norm":
            name = f"{block}{attention}{SPELLING_OF_2022.get(module, module)}.{parameter}"
            array = array[:, :, 0, 0] if array.shape[2:] == (1, 1) else array
        tensors[name] = array
    return tensors


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of the config that names and shapes tell, and the likeliest number of groups.

    Raises InputError if these are not the names and shapes of such an autoencoder.
    """
    try:
        in_channels = shapes["encoder.conv_in.weight"][1]
        moments = shapes["encoder.conv_out.weight"][0]
        out_channels = shapes["decoder.conv_out.weight"][0]
        resnet = "encoder.down_blocks.{}.resnets.{}.conv1.weight".format
        widths = [shapes[resnet(i, 0)][0] for i in range(_count(r"encoder\.down_blocks\.(\d+)", shapes))]
    except (KeyError, IndexError) as error:
        some = ", ".join(sorted(shapes)[:3])
        raise InputError(f"these are not the weights of an AutoencoderKL: no {error}; there are {some}, ...") from error
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": _count(r"encoder\.down_blocks\.0\.resnets\.(\d+)", shapes),
        "latent_channels": moments // 2,
        "norm_num_groups": math.gcd(AutoencoderConfig.norm_num_groups, *widths),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(".attentions." in name for name in shapes),
    }


def diffusers_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The `config.json` of an autoencoder."""
    blocks = {name: [kind] * len(config.block_out_channels) for name, kind in BLOCKS.items()}
    # From that side on diffusers, too, decodes in tiles, if it is asked to.
    return {"_class_name": CLASS_NAME, "sample_size": TILE} | FIXED | blocks | dataclasses.asdict(config)


def _count(pattern: str, names: Iterable[str]) -> int:
    """How many things are numbered so among the names."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def describe(config: AutoencoderConfig) -> str:
    """The architecture for people."""
    return (
        f"an AutoencoderKL with block_out_channels={config.block_out_channels}, "
        f"layers_per_block={config.layers_per_block}, latent_channels={config.latent_channels}"
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The fields of AutoencoderConfig in a config.json. Raises InputError for what we cannot compute."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(AutoencoderConfig)}
    kinds = {name: KINDS.get(kind, kind) for name, kind in fields.items()}
    config = read_json(path, **kinds, **dict.fromkeys(BLOCKS, list))
    if config.get("_class_name") != CLASS_NAME:
        raise InputError(f"{path} is of a {config.get('_class_name')}; expected {CLASS_NAME}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise InputError(f"{path} has {name}={config[name]!r}; expected {value!r}")
    for name, kind in BLOCKS.items():
        if odd := [block for block in config.get(name, []) if block != kind]:
            raise InputError(f"{path} has a {odd[0]} among {name}; expected {kind} only")
    return DEFAULTS | {name: config[name] for name in fields if name in config}
