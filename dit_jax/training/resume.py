"""What a checkpoint of a run holds, and how a run goes on from one."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dit_jax import __version__
from dit_jax.checkpoints.store import CheckpointStore
from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.parallel.processes import say
from dit_jax.training.metrics import NOTHING
from dit_jax.training.state import TrainState, abstract_state

# How the network is computed may change from one start to the next; what it is may not.
COMPUTATION = {"dtype", "attention_kernel", "remat", "unroll"}


def parts(state: TrainState) -> dict[str, Any]:
    """What of a state is stored, by the name of its folder."""
    return {"model": state.params, "ema": state.ema, "opt": state.opt_state}


def save(
    store: CheckpointStore,
    step: int,
    state: TrainState,
    config: ConfigDict,
    class_names: Sequence[str],
    interval: Callable[[], dict | None] = lambda: NOTHING,
    copy_to: str | None = None,
    **more: Any,
) -> None:
    """Write the checkpoint of `step`: the state, the config, and what the log has of an unfinished line, if any.

    interval: see `TrainingLog.unfinished`; if it gives None, there will be no checkpoint. copy_to: see
    `CheckpointStore.save`. `more` goes into the record: the autoencoder; where a state that was not trained here comes
    from.
    """

    def record() -> dict | None:
        line = interval()
        if line is None:
            return None
        return {
            "config": json.loads(config.to_json_best_effort()),
            "class_names": list(class_names),
            "interval": line,
            "dit_jax": __version__,
            **more,
        }

    store.save(step, parts(state), record, copy_to=copy_to)


def restore(store: CheckpointStore, config: ConfigDict, mesh: Mesh) -> tuple[int, TrainState, dict] | None:
    """(step, state on the mesh, unfinished line of the log) of the newest readable checkpoint; None if there is none.

    Damaged checkpoints newer than that one are moved to `damaged/` beside `checkpoints/`, since their steps come
    again. Raises InputError if the checkpoint is of another architecture.
    """
    wanted = abstract_state(config, mesh)

    def abstract(record: dict) -> dict:
        require_same_architecture(config, record["config"], store.folder)
        return parts(wanted)

    restored = store.restore_newest(abstract)
    if restored is None:
        return None
    step, record, trees = restored
    for damaged in [newer for newer in store.steps() if newer > step]:
        store.set_aside(damaged, store.folder.parent / "damaged")
    for line in changes(record["config"], json.loads(config.to_json_best_effort())):
        say(f"config changed since the checkpoint: {line}", file=sys.stderr)
    count = jax.device_put(jnp.asarray(step, jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return step, TrainState(count, trees["model"], trees["ema"], trees["opt"]), record["interval"]


def require_same_architecture(config: ConfigDict, saved: dict, folder: Path) -> None:
    """Raise InputError, naming the fields, if a saved config describes another network."""
    there = {name: saved["model"].get(name, getattr(DiTConfig, name)) for name in config.model}
    theirs, ours = (dataclasses.asdict(DiTConfig(**model)) for model in (there, config.model))
    differing = [
        f"{name}={theirs[name]!r} there, {value!r} here"
        for name, value in ours.items()
        if name not in COMPUTATION and theirs[name] != value
    ]
    if differing:
        raise InputError(
            f"{folder} holds checkpoints of another architecture ({'; '.join(differing)}): "
            "choose another --workdir, or set config.model as it was"
        )


def changes(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`a.b: 1 -> 2` for every setting that differs."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changes(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before!r} -> {after!r}")
    return lines
