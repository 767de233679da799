"""DiT as diffusers keeps it: other names, fused matrices apart, the embedders copied into every block."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_jax.checkpoints.record import Record
from dit_jax.checkpoints.tensor_files import read_tensors, write_tensors
from dit_jax.config import BEYOND_DIT, DiTConfig
from dit_jax.errors import InputError
from dit_jax.files import read_json, replacing_folder, write_json

# The official module, and diffusers' in its place. Several share its rows; one with {i} where the official name has
# none is a copy in every block. `pos_embed` is not stored there.
MODULES = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2"],
    "y_embedder.embedding_table": ["transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table"],
    "blocks.{i}.attn.qkv": [f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"],
    "blocks.{i}.attn.proj": ["transformer_blocks.{i}.attn1.to_out.0"],
    "blocks.{i}.mlp.fc1": ["transformer_blocks.{i}.ff.net.0.proj"],
    "blocks.{i}.mlp.fc2": ["transformer_blocks.{i}.ff.net.2"],
    "blocks.{i}.adaLN_modulation.1": ["transformer_blocks.{i}.norm1.linear"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}
CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is older, and what the Hub has
WEIGHTS = "diffusion_pytorch_model"
FIXED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
NUMBERS = dict.fromkeys(("num_layers", "num_attention_heads", "sample_size", "num_embeds_ada_norm"), int)
PREDICTIONS = {"epsilon": "epsilon", "x_start": "sample"}


class Folder(NamedTuple):
    """What a folder of diffusers holds, in our terms."""

    state_dict: dict[str, np.ndarray]
    """Under the official names."""
    record: dict
    """What `write_folder` left there, or {}."""
    known: dict[str, int]
    """What the shapes do not tell, as arguments of `architecture.infer`."""
    diffusion: dict[str, Any]
    class_names: list[str]
    """Of `id2label`; none if there is no such thing."""
    vae: Path | None
    weights_file: Path


def read_folder(folder: Path) -> Folder:
    """Read a pipeline's folder, or that of its transformer alone.

    Raises InputError if a file is missing or damaged, the network is not a DiT, or the copies of an embedder differ.
    """
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (transformer / "config.json").is_file():
        raise InputError(f"{folder} holds no weights: no record.json, checkpoints of a run, or diffusers' config.json")
    config = read_json(transformer / "config.json", **NUMBERS)
    if config.get("_class_name") not in CLASS_NAMES:
        raise InputError(f"{transformer} holds a {config.get('_class_name')}; expected one of {', '.join(CLASS_NAMES)}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise InputError(f"{transformer} has {name}={config[name]!r}; a DiT has {value!r}")
    files = [transformer / (WEIGHTS + suffix) for suffix in (".safetensors", ".bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"{transformer} has neither {files[0].name} nor {files[1].name}")
    tensors, record = read_tensors(file)
    try:
        state_dict = to_official(tensors, config["num_layers"])
        known = {"num_heads": config["num_attention_heads"], "input_size": config["sample_size"]}
        known["num_classes"] = config["num_embeds_ada_norm"]
    except KeyError as error:
        raise InputError(f"{transformer / 'config.json'} has no {error}") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    index, schedule = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    names = read_json(index, id2label=dict).get("id2label", {}) if index.is_file() else {}
    return Folder(
        state_dict,
        record,
        known,
        _read_process(schedule) if schedule.is_file() else {},
        [str(names[str(label)]) for label in range(len(names)) if str(label) in names],
        folder / "vae" if (folder / "vae").is_dir() else None,
        file,
    )


def write_folder(folder: Path, record: Record, state_dict: dict[str, np.ndarray], vae: Path | None) -> None:
    """Write a pipeline's folder that `DiTTransformer2DModel.from_pretrained` and, with a vae, `DiTPipeline` take.

    It appears when it is whole, and must not be there before. Raises InputError for what diffusers cannot hold.
    """
    config = transformer_config(record.model)
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(label): name for label, name in enumerate(record.class_names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", CLASS_NAMES[0]],
    }
    with replacing_folder(folder) as temporary:
        tensors = from_official(state_dict, record.model.depth)
        write_tensors(temporary / "transformer" / (WEIGHTS + ".safetensors"), tensors, record.to_json())
        write_json(temporary / "transformer" / "config.json", config)
        write_json(temporary / "scheduler" / "scheduler_config.json", _scheduler_config(record))
        if vae:
            shutil.copytree(vae, temporary / "vae")
            index["vae"] = ["diffusers", "AutoencoderKL"]
        write_json(temporary / "model_index.json", index)


def to_official(tensors: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """The state dict under the official names, without `pos_embed`; `tensors` is emptied on the way.

    Raises InputError if a name is missing or surplus, or copies differ: the official layout holds one.
    """
    state_dict = {}
    if not 0 < depth <= len(tensors):
        raise InputError(f"holds {len(tensors)} tensors, which are not those of {depth} layers")
    for official, theirs in _names(depth):
        if missing := [name for name in theirs if name not in tensors]:
            raise InputError(f"lacks {missing[0]}")
        first, *others = parts = [tensors.pop(name) for name in theirs]
        if not _is_copied(theirs):
            state_dict[official] = np.concatenate(parts) if others else first
            continue
        for name, other in zip(theirs[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise InputError(
                    f"{name} differs from {theirs[0]}: these embedders were trained apart from each other, block by "
                    "block, and a DiT has one for all blocks"
                )
        state_dict[official] = first
    if tensors:
        raise InputError(f"holds {min(tensors)}, which a DiT of {depth} layers does not have")
    return state_dict


def from_official(state_dict: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """The reverse; copies share their memory, and `state_dict` is emptied on the way."""
    state_dict.pop("pos_embed", None)
    tensors = {}
    for official, theirs in _names(depth):
        tensor = state_dict.pop(official)
        parts = [tensor] * len(theirs) if _is_copied(theirs) else np.split(tensor, len(theirs))
        tensors |= zip(theirs, parts, strict=True)
    return tensors


def transformer_config(config: DiTConfig) -> dict[str, Any]:
    """The `config.json` of a DiT. Raises InputError for one that diffusers has no setting for."""
    if config.mlp_width != 4 * config.hidden_size:
        raise InputError(f"mlp_ratio={config.mlp_ratio}: diffusers has 4 built in")
    if beyond := [name for name in BEYOND_DIT if getattr(config, name) != getattr(DiTConfig, name)]:
        told = ", ".join(f"{name}={getattr(config, name)!r}" for name in beyond)
        raise InputError(f"{told}: diffusers has no such DiT; write .safetensors instead")
    return FIXED | {
        "_class_name": CLASS_NAMES[0],
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_width,
        "attention_bias": True,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.label_rows - 1,  # it always adds a row for the null class
        "norm_eps": config.norm2_eps,
    }


def _names(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Every official tensor and those of diffusers that make it up."""
    for module, theirs in MODULES.items():
        for part in ("weight", "bias") if module != "y_embedder.embedding_table" else ("weight",):
            if "{i}" in module:
                for i in range(depth):
                    yield f"{module}.{part}".format(i=i), [f"{name}.{part}".format(i=i) for name in theirs]
            else:
                copies = range(depth) if "{i}" in theirs[0] else [0]
                yield f"{module}.{part}", [f"{theirs[0]}.{part}".format(i=i) for i in copies]


def _is_copied(theirs: list[str]) -> bool:
    return ".norm1.emb." in theirs[0]


def _read_process(path: Path) -> dict[str, Any]:
    """The fields of `config.diffusion` that a scheduler's config tells."""
    betas = {"beta_start": int | float, "beta_end": int | float}
    config = read_json(path, beta_schedule=str, prediction_type=str, num_train_timesteps=int, **betas)
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    steps = config.get("num_train_timesteps", 1000)
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    if schedule not in ("linear", "squaredcos_cap_v2") or prediction not in predictions or steps < 1:
        raise InputError(
            f"{path} has beta_schedule={schedule!r}, prediction_type={prediction!r} and {steps} steps: not one of DiT's"
        )
    for name, beta in _linear_betas(steps).items():
        if schedule == "linear" and not math.isclose(config.get(name, beta), beta):
            raise InputError(f"{path} has {name}={config[name]} over {steps} steps; a DiT has {beta}")
    return {"schedule": schedule, "steps": steps, "prediction": predictions[prediction]}


def _scheduler_config(record: Record) -> dict[str, Any]:
    steps = record.diffusion["steps"]
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": record.diffusion["schedule"],
        **_linear_betas(steps),
        "prediction_type": PREDICTIONS[record.diffusion["prediction"]],
        "clip_sample": record.sample["clip_denoised"],
        "set_alpha_to_one": True,
    }


def _linear_betas(steps: int) -> dict[str, float]:
    return {"beta_start": 1e-4 * 1000 / steps, "beta_end": 0.02 * 1000 / steps}
