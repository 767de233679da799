"""A training run moved whole between PyTorch and here: weights, their average, AdamW's moments and its step count."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dit_jax.checkpoints import files, torch_layout
from dit_jax.checkpoints.record import Record
from dit_jax.checkpoints.store import CheckpointStore, Restored, read_newest
from dit_jax.checkpoints.tensor_files import (
    PICKLES,
    RECORD,
    from_torch,
    import_torch,
    read_pickle,
    to_torch,
    write_pickle,
)
from dit_jax.config import DiTConfig, base_config
from dit_jax.errors import InputError
from dit_jax.files import digest, replacing_folder
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training import resume
from dit_jax.training.optimizer import learning_rate
from dit_jax.training.state import TrainState, abstract_state

MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}  # PyTorch's names and optax's


def export_run(workdir: str | Path, path: Path) -> int:
    """Write the newest checkpoint of a run as what the official `train.py` saves: `model`, `ema` and `opt`.

    Returns its step. The file holds tensors and plain values only. Raises InputError if there is nothing to read.
    """
    restored = _restore(Path(workdir))
    config = ConfigDict(restored.record["config"])
    model = DiTConfig(**config.model)
    opt = restored.trees.pop("opt")
    moments = {theirs: _state_dict(model, optax.tree.get(opt, ours)) for theirs, ours in MOMENTS.items()}
    del opt
    content = {name: to_torch(_state_dict(model, restored.trees.pop(name))) for name in ("model", "ema")}
    content["opt"] = _optimizer_state(config, restored.step, content["model"], moments)
    content[RECORD] = Record(
        model,
        config.diffusion.to_dict(),
        config.sample.to_dict(),
        restored.record["class_names"],
        config.get("context", ""),
        autoencoder=restored.record.get("autoencoder"),
        step=restored.step,
        source=Path(workdir).name,
        sha256=digest(Path(workdir) / "checkpoints" / str(restored.step)),
    ).to_json()
    content["config"] = restored.record["config"]
    write_pickle(path, content)
    return restored.step


def import_run(path: Path, workdir: str | Path, **known: int) -> int:
    """Make a run that resumes from a checkpoint of the official `train.py`, or of `export_run`. Returns its step.

    `known` is heard where the shapes leave something open (`architecture.infer`). Settings that the file tells, those
    of AdamW among them, become the run's config; a config that differs says so when the run resumes. Raises InputError
    if the file is not whole, lacks a part, or `workdir` is there already.
    """
    content = read_pickle(path)
    if lacking := [name for name in ("model", "ema", "opt") if name not in content]:
        raise InputError(f"{path} has no {lacking[0]!r}: expected a training checkpoint with model, ema and opt")
    step, mu, nu = _moments(content["opt"], list(content["model"]), path)
    fields, trees = content.get(RECORD, {}), []
    for state_dict in (content.pop("model"), content.pop("ema"), mu, nu):
        tensors, _ = from_torch(state_dict, path)
        record, leaves = files.from_state_dict(tensors, fields, known, path)
        trees.append(unflatten_dict(dict(leaves), sep="/"))
        fields = record.to_json()
    params, ema, mu, nu = trees
    config = _config(record.model, content)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_state(config, _one_device()).opt_state)
    opt_state = optax.tree.set(zeros, mu=mu, nu=nu, count=np.int32(step))
    with replacing_folder(workdir) as folder:
        store = CheckpointStore(folder / "checkpoints")
        state = jax.device_put(TrainState(np.int32(step), params, ema, opt_state))
        more = {"autoencoder": record.autoencoder, "source": path.name, "sha256": digest(path)}
        resume.save(store, step, state, config, record.class_names, **more)
        store.close()
    return step


def is_torch_run(path: Path) -> bool:
    """Whether this is a file with the state of a training run."""
    content = read_pickle(path, device="meta") if path.suffix in PICKLES else None
    return isinstance(content, dict) and {"model", "ema", "opt"} <= content.keys()


def _restore(workdir: Path) -> Restored:
    def abstract(record: dict) -> dict:
        state = abstract_state(ConfigDict(record["config"]), _one_device())
        return {"model": state.params, "ema": state.ema, "opt": state.opt_state}

    return read_newest(workdir, abstract)


def _one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def _state_dict(model: DiTConfig, params: dict) -> dict[str, np.ndarray]:
    return torch_layout.from_leaves(model, flatten_dict(params, sep="/").items())


def _optimizer_state(config: ConfigDict, step: int, weights: dict, moments: dict[str, dict]) -> dict[str, Any]:
    """AdamW's state dict: parameters by number, in the order of the model's; `pos_embed`, not trained, has none."""
    torch = import_torch("writing AdamW's state")
    c = config.optimizer
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(tensor) for tensor in weights.values()],
        lr=float(learning_rate(config)(step)),
        betas=(c.b1, c.b2),
        eps=c.eps,
        weight_decay=c.weight_decay,
    )
    numbers = {name: number for number, name in enumerate(weights) if name != "pos_embed"}
    state = {
        number: {"step": torch.tensor(float(step))}
        | {moment: torch.from_numpy(arrays[name]) for moment, arrays in moments.items()}
        for name, number in numbers.items()
    }
    return optimizer.state_dict() | {"state": state}


def _moments(opt: Any, names: list[str], path: Path) -> tuple[int, dict, dict]:
    """The step, and AdamW's two moments as state dicts. Raises InputError if they are not those of the parameters."""
    try:
        numbers = [number for group in opt["param_groups"] for number in group["params"]]
        by_name = {name: opt["state"].get(number) for name, number in zip(names, numbers, strict=True)}
        by_name.pop("pos_embed", None)  # not trained
        step = max(int(entry["step"]) for entry in by_name.values())
        mu, nu = ({name: entry[moment] for name, entry in by_name.items()} for moment in MOMENTS)
        return step, mu, nu
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: 'opt' is not the state of AdamW for the model ({error!r})") from error


def _config(model: DiTConfig, content: dict) -> ConfigDict:
    """The config of the run that was exported, or else the released one with what the checkpoint tells."""
    if "config" in content:
        return ConfigDict(content["config"])
    config, args, (group, *_) = base_config(), content.get("args"), content["opt"]["param_groups"]
    config.model.update(dataclasses.asdict(model))
    config.diffusion.update(Record.of(model).diffusion)
    config.optimizer.update(learning_rate=group["lr"], b1=group["betas"][0], b2=group["betas"][1], eps=group["eps"])
    config.optimizer.weight_decay = float(group["weight_decay"])
    config.batch_size = getattr(args, "global_batch_size", config.batch_size)
    config.seed = getattr(args, "global_seed", config.seed)
    return config
