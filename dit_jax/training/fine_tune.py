"""How a run starts: from noise, or from weights that somebody has trained."""

import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dit_jax.checkpoints.files import open_weights
from dit_jax.checkpoints.record import Record
from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.parallel.processes import say
from dit_jax.parallel.sharding import state_sharding
from dit_jax.training.resume import changes
from dit_jax.training.state import TrainState, init_state


def first_state(config: ConfigDict, mesh: Mesh, class_names: Sequence[str]) -> TrainState:
    """The state before the first step, its weights and their average those of `config.init_from` if that is set.

    Another number of classes gives a fresh label table, another input size its own positions; a context or gates of
    heads, where there were none, begin fresh and change nothing at first; attention may have another schedule. Each
    difference is a line on stderr. Raises InputError if the network differs in anything else, or there is nothing to
    read.
    """
    state = init_state(config, mesh)
    if not config.init_from:
        return state
    ours = DiTConfig(**config.model)
    hints = {name: getattr(ours, name) for name in ("num_heads", "num_classes", "input_size")}
    opened = open_weights(config.init_from, shardings=partial(state_sharding, mesh), **hints)
    require_same_network(opened.record.model, ours, opened.origin)
    params = opened.params(partial(state_sharding, mesh))
    fresh, table = state.params["y_embedder"], params["y_embedder"]["embedding_table"]
    if table.shape != fresh["embedding_table"].shape:
        params["y_embedder"] = fresh
    params = unflatten_dict(flatten_dict(state.params) | flatten_dict(params))
    for line in differences(opened.record, config, class_names):
        say(f"starting from {opened.origin}: {line}", file=sys.stderr)
    return state.replace(params=params, ema=jax.tree.map(jnp.copy, params))


def require_same_network(theirs: DiTConfig, ours: DiTConfig, origin: str) -> None:
    """Raise InputError, naming the fields, unless one's weights mean the same in the other."""
    fields = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "learn_sigma")
    fields += ("downscale_freq_shift", "norm2_eps", "head_dim", "heads_left", "qk_norm", "rope", "block")
    # What a network does not have it can be given.
    fields += ("context_features",) if theirs.context_features else ()
    fields += ("head_gate",) if theirs.head_gate != "none" else ()
    differing = [
        f"{name}={getattr(theirs, name)} there, {getattr(ours, name)} here"
        for name in fields
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if int(theirs.mlp_ratio * ours.hidden_size) != ours.mlp_width:
        differing.append(f"mlp_ratio={theirs.mlp_ratio} there, {ours.mlp_ratio} here")
    if differing:
        raise InputError(f"{origin} is of another network ({'; '.join(differing)}): set config.model as it is there")


def differences(record: Record, config: ConfigDict, class_names: Sequence[str]) -> list[str]:
    """What a user should know of where the weights were trained in another way than they will be now."""
    theirs, ours = record.model, DiTConfig(**config.model)
    lines = [f"diffusion.{line}" for line in changes(record.diffusion, config.diffusion.to_dict())]
    if theirs.context_features != ours.context_features:
        lines.append(f"fresh modules for a context of {ours.context_features} features, which it did not have")
    if theirs.head_gate != ours.head_gate:
        lines.append("fresh gates of heads, all open, which it did not have")
    if theirs.attention != ours.attention:
        lines.append(f"attention: {theirs.attention} -> {ours.attention}")
    if record.context != config.context and theirs.context_features:
        lines.append(f"context: {record.context!r} -> {config.context!r}")
    if theirs.input_size != ours.input_size:
        lines.append(f"positions for inputs of {ours.input_size}, not {theirs.input_size}")
    if theirs.label_rows != ours.label_rows:
        lines.append(f"a fresh label table of {ours.label_rows} rows, not {theirs.label_rows}")
    elif record.class_names not in (list(class_names), Record.of(ours).class_names):
        names = ", ".join(record.class_names[:3])
        lines.append(f"the label table is kept, whose classes were {names} and so on")
    if theirs.class_dropout_prob != ours.class_dropout_prob:
        lines.append(f"class_dropout_prob: {theirs.class_dropout_prob} -> {ours.class_dropout_prob}")
    return lines
