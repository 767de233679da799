"""DiT under the names and shapes of the official PyTorch state dict, both ways from one table."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.dit import DiT, abstract_dit, sincos_positions


class Entry(NamedTuple):
    """One PyTorch tensor, its place among our parameters, and the way between their shapes.

    A name with `{i}` stands for that tensor of every block; ours is the stack of them.
    """

    name: str
    path: str
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def from_state_dict(config: DiTConfig, state_dict: Mapping[str, np.ndarray]) -> DiT:
    """A DiT with the given weights, as float32.

    Raises InputError if a tensor is missing, extra, of another shape, or if `pos_embed` (which may be left out) is
    not the fixed table: positions are not trained.
    """
    graph, abstract = abstract_dit(config)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
    _check_positions(config, state_dict)
    expected = set(_torch_names(config))
    if missing := sorted(expected - state_dict.keys()):
        raise InputError(f"the state dict lacks {_some(missing)}, which {_describe(config)} has")
    if extra := sorted(state_dict.keys() - expected - {"pos_embed"}):
        raise InputError(f"the state dict holds {_some(extra)}, which {_describe(config)} does not have")

    def convert(entry: Entry, name: str, shape: tuple[int, ...]) -> np.ndarray:
        theirs = np.asarray(state_dict[name], dtype=np.float32)
        wanted = entry.to_torch(np.broadcast_to(np.float32(0), shape)).shape
        if theirs.shape != wanted:
            raise InputError(f"{name} has shape {theirs.shape}; {_describe(config)} expects {wanted}")
        return entry.from_torch(theirs)

    params = {}
    for entry in table(config):
        shape = shapes[entry.path]
        if "{i}" in entry.name:
            blocks = [convert(entry, entry.name.format(i=i), shape[1:]) for i in range(config.depth)]
            params[entry.path] = jnp.asarray(np.stack(blocks))
        else:
            params[entry.path] = jnp.array(convert(entry, entry.name, shape))
    return nnx.merge(graph, unflatten_dict(params, sep="/"))


def to_state_dict(model: DiT) -> dict[str, np.ndarray]:
    """The weights of a DiT as float32 arrays under the official names, `pos_embed` included."""
    config, params = model.config, flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/")
    state_dict = {"pos_embed": _positions(config).copy()}
    for entry in table(config):
        ours = np.asarray(params[entry.path])
        if "{i}" not in entry.name:
            state_dict[entry.name] = np.array(entry.to_torch(ours), order="C")
    blocks = [entry for entry in table(config) if "{i}" in entry.name]
    for i in range(config.depth):
        for entry in blocks:
            ours = np.asarray(params[entry.path][i])
            state_dict[entry.name.format(i=i)] = np.array(entry.to_torch(ours), order="C")
    return {name: state_dict[name] for name in ("pos_embed", *_torch_names(config))}


def table(config: DiTConfig) -> list[Entry]:
    """Every tensor of the state dict but `pos_embed`, in the order of the PyTorch parameters."""
    p, C = config.patch_size, config.in_channels
    return [
        Entry(
            "x_embedder.proj.weight",
            "x_embedder/proj/kernel",
            lambda ours: ours.reshape(p, p, C, -1).transpose(3, 2, 0, 1),
            lambda theirs: theirs.transpose(2, 3, 1, 0).reshape(p * p * C, -1),
        ),
        _same("x_embedder.proj.bias", "x_embedder/proj/bias"),
        *_linear("t_embedder.mlp.0", "t_embedder/mlp/fc1"),
        *_linear("t_embedder.mlp.2", "t_embedder/mlp/fc2"),
        _same("y_embedder.embedding_table.weight", "y_embedder/embedding_table"),
        *_qkv("blocks.{i}.attn.qkv", "blocks/attn/qkv", config.num_heads),
        *_linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
        *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
        *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
        *_linear("blocks.{i}.adaLN_modulation.1", "blocks/adaLN_modulation/linear"),
        *_linear("final_layer.linear", "final_layer/linear"),
        *_linear("final_layer.adaLN_modulation.1", "final_layer/adaLN_modulation/linear"),
    ]


def _linear(name: str, path: str) -> list[Entry]:
    """torch.nn.Linear keeps (out, in), ours is (in, out)."""
    weight = Entry(f"{name}.weight", f"{path}/kernel", lambda ours: ours.T, lambda theirs: theirs.T)
    return [weight, _same(f"{name}.bias", f"{path}/bias")]


def _qkv(name: str, path: str, heads: int) -> list[Entry]:
    """PyTorch's rows are [q; k; v], each by head; our columns are by head, each [q, k, v]."""

    def to_torch(ours: np.ndarray) -> np.ndarray:
        by_head = ours.T.reshape(heads, 3, -1, *ours.shape[:-1])
        return by_head.swapaxes(0, 1).reshape(ours.T.shape)

    def from_torch(theirs: np.ndarray) -> np.ndarray:
        by_part = theirs.reshape(3, heads, -1, *theirs.shape[1:])
        return by_part.swapaxes(0, 1).reshape(theirs.shape).T

    return [
        Entry(f"{name}.weight", f"{path}/kernel", to_torch, from_torch),
        Entry(f"{name}.bias", f"{path}/bias", to_torch, from_torch),
    ]


def _same(name: str, path: str) -> Entry:
    return Entry(name, path, lambda ours: ours, lambda theirs: theirs)


def _torch_names(config: DiTConfig) -> list[str]:
    """The names of the state dict but `pos_embed`, block after block."""
    entries = table(config)
    first_block = next(i for i, entry in enumerate(entries) if "{i}" in entry.name)
    blocks = [entry.name for entry in entries if "{i}" in entry.name]
    return [
        *(entry.name for entry in entries[:first_block]),
        *(name.format(i=i) for i in range(config.depth) for name in blocks),
        *(entry.name for entry in entries[first_block + len(blocks) :]),
    ]


def _positions(config: DiTConfig) -> np.ndarray:
    return sincos_positions(config.hidden_size, config.input_size // config.patch_size)[None]


def _check_positions(config: DiTConfig, state_dict: Mapping[str, np.ndarray]) -> None:
    if "pos_embed" not in state_dict:
        return
    theirs, ours = np.asarray(state_dict["pos_embed"], dtype=np.float32), _positions(config)
    if theirs.shape != ours.shape:
        raise InputError(f"pos_embed has shape {theirs.shape}; {_describe(config)} expects {ours.shape}")
    if not np.allclose(theirs, ours, atol=1e-3):  # an EMA of it drifts by rounding
        raise InputError("pos_embed is not the fixed sin-cos table: weights with trained positions are not DiT's")


def _describe(config: DiTConfig) -> str:
    return (
        f"a DiT with depth={config.depth}, hidden_size={config.hidden_size}, patch_size={config.patch_size}, "
        f"in_channels={config.in_channels}, num_classes={config.num_classes}, input_size={config.input_size}"
    )


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
