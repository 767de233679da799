"""DiT under the names and shapes of the official PyTorch state dict, both ways from one table."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.attention import first_heads
from dit_jax.models.dit import DiT, abstract_dit
from dit_jax.models.positions import sincos_positions

Leaf = tuple[str, np.ndarray]
"""A parameter of ours: its path, such as `blocks/attn/qkv/kernel`, and its values."""


class Entry(NamedTuple):
    """One PyTorch tensor, its place among our parameters, and the way between their shapes.

    A name with `{i}` stands for that tensor of every block; ours is the stack of them, where a block with fewer heads
    than another is filled up with zeros.
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
    graph, _ = abstract_dit(config)
    params = {path: jnp.array(array) for path, array in to_leaves(config, dict(state_dict))}
    return nnx.merge(graph, unflatten_dict(params, sep="/"))


def to_state_dict(model: DiT) -> dict[str, np.ndarray]:
    """The weights of a DiT as float32 arrays under the official names, `pos_embed` included."""
    params = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/")
    return from_leaves(model.config, params.items())


def to_leaves(config: DiTConfig, state_dict: dict[str, np.ndarray]) -> Iterator[Leaf]:
    """Our parameters, the small ones first, made one at a time from a state dict that is emptied on the way.

    So no more than one parameter is in memory twice. Raises InputError, at once, as `from_state_dict` does.
    """
    _check(config, state_dict)
    _, abstract = abstract_dit(config)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}

    def leaves() -> Iterator[Leaf]:
        for entry in sorted(table(config), key=lambda entry: math.prod(shapes[entry.path])):
            leaf = np.zeros(shapes[entry.path], np.float32)
            if "{i}" in entry.name:
                for i, heads in enumerate(config.block_heads):
                    theirs = state_dict.pop(entry.name.format(i=i))
                    _fill(first_heads(entry.path, leaf[i], heads, config.num_heads), entry.from_torch(theirs))
            else:
                _fill(leaf, entry.from_torch(state_dict.pop(entry.name)))
            yield entry.path, leaf
            del leaf  # before the next one is made

    return leaves()


def from_leaves(config: DiTConfig, leaves: Iterable[Leaf]) -> dict[str, np.ndarray]:
    """The state dict, `pos_embed` included, in PyTorch's order, from parameters that may come one at a time."""
    entries = {entry.path: entry for entry in table(config)}
    state_dict = {"pos_embed": positions(config).copy()}
    for path, leaf in leaves:
        entry, leaf = entries[path], np.asarray(leaf)
        if "{i}" in entry.name:
            for i, heads in enumerate(config.block_heads):
                theirs = entry.to_torch(first_heads(path, leaf[i], heads, config.num_heads))
                state_dict[entry.name.format(i=i)] = _contiguous(theirs)
                del theirs  # which may be a view of the leaf
        else:
            state_dict[entry.name] = _contiguous(entry.to_torch(leaf))
        del leaf  # before the next one is read
    return {name: state_dict[name] for name in ("pos_embed", *tensor_names(config))}


def _fill(array: np.ndarray, values: np.ndarray) -> None:
    """array[...] = values, in strips: NumPy takes five times as long to copy a transposed matrix whole."""
    for start in range(0, values.shape[-1], 64):
        strip = ..., slice(start, start + 64)
        array[strip] = values[strip]


def _contiguous(values: np.ndarray) -> np.ndarray:
    array = np.empty(values.shape, values.dtype)
    _fill(array, values)
    return array


def table(config: DiTConfig) -> list[Entry]:
    """Every tensor of the state dict but `pos_embed`, in the order of the PyTorch parameters."""
    p, C = config.patch_size, config.in_channels
    adaptive = config.block in ("adaLN-Zero", "adaLN")
    crossed = config.context_features or config.block == "cross-attention"
    norms = [*_norm("blocks.{i}.norm1", "blocks/norm1"), *_norm("blocks.{i}.norm2", "blocks/norm2")]
    return [
        Entry(
            "x_embedder.proj.weight",
            "x_embedder/proj/kernel",
            lambda ours: ours.reshape(p, p, C, -1).transpose(3, 2, 0, 1),
            lambda theirs: theirs.transpose(2, 3, 1, 0).reshape(p * p * C, -1),
        ),
        _same("x_embedder.proj.bias", "x_embedder/proj/bias"),
        *_mlp("t_embedder.mlp", "t_embedder/mlp"),
        _same("y_embedder.embedding_table.weight", "y_embedder/embedding_table"),
        *(_mlp("context_embedder.mlp", "context_embedder/mlp") if config.context_features else []),
        *_by_head("blocks.{i}.attn.qkv", "blocks/attn/qkv", 3, config.head_width),
        *(_rms_norms() if config.qk_norm else []),
        *(_linear("blocks.{i}.attn.gate", "blocks/attn/gate/linear") if config.head_gate != "none" else []),
        *_linear("blocks.{i}.attn.proj", "blocks/attn/proj"),
        *(_cross_attention(config.head_width) if crossed else []),
        *_linear("blocks.{i}.mlp.fc1", "blocks/mlp/fc1"),
        *_linear("blocks.{i}.mlp.fc2", "blocks/mlp/fc2"),
        *(_linear("blocks.{i}.adaLN_modulation.1", "blocks/adaLN_modulation/linear") if adaptive else norms),
        *_linear("final_layer.linear", "final_layer/linear"),
        *(
            _linear("final_layer.adaLN_modulation.1", "final_layer/adaLN_modulation/linear")
            if adaptive
            else _norm("final_layer.norm_final", "final_layer/norm")
        ),
    ]


def _linear(name: str, path: str) -> list[Entry]:
    """torch.nn.Linear keeps (out, in), ours is (in, out)."""
    weight = Entry(f"{name}.weight", f"{path}/kernel", lambda ours: ours.T, lambda theirs: theirs.T)
    return [weight, _same(f"{name}.bias", f"{path}/bias")]


def _mlp(name: str, path: str) -> list[Entry]:
    """torch.nn.Sequential numbers the linear layers around an activation 0 and 2."""
    return [*_linear(f"{name}.0", f"{path}/fc1"), *_linear(f"{name}.2", f"{path}/fc2")]


def _norm(name: str, path: str) -> list[Entry]:
    return [_same(f"{name}.weight", f"{path}/weight"), _same(f"{name}.bias", f"{path}/bias")]


def _rms_norms() -> list[Entry]:
    return [_same(f"blocks.{{i}}.attn.{name}.weight", f"blocks/attn/{name}/weight") for name in ("q_norm", "k_norm")]


def _cross_attention(head_width: int) -> list[Entry]:
    name, path = "blocks.{i}.cross_attn", "blocks/cross_attn"
    kv = _by_head(f"{name}.kv", f"{path}/kv", 2, head_width)
    return [*_linear(f"{name}.q", f"{path}/q"), *kv, *_linear(f"{name}.proj", f"{path}/proj")]


def _by_head(name: str, path: str, parts: int, head_width: int) -> list[Entry]:
    """PyTorch's rows are [q; k; v], each by head; our columns are by head, each [q, k, v]."""

    def to_torch(ours: np.ndarray) -> np.ndarray:
        by_head = ours.T.reshape(-1, parts, head_width, *ours.shape[:-1])
        return by_head.swapaxes(0, 1).reshape(ours.T.shape)

    def from_torch(theirs: np.ndarray) -> np.ndarray:
        by_part = theirs.reshape(parts, -1, head_width, *theirs.shape[1:])
        return by_part.swapaxes(0, 1).reshape(theirs.shape).T

    return [
        Entry(f"{name}.weight", f"{path}/kernel", to_torch, from_torch),
        Entry(f"{name}.bias", f"{path}/bias", to_torch, from_torch),
    ]


def _same(name: str, path: str) -> Entry:
    return Entry(name, path, lambda ours: ours, lambda theirs: theirs)


def tensor_names(config: DiTConfig) -> list[str]:
    """The names of the state dict but `pos_embed`, block after block: the order of the PyTorch parameters."""
    entries = table(config)
    first_block = next(i for i, entry in enumerate(entries) if "{i}" in entry.name)
    blocks = [entry.name for entry in entries if "{i}" in entry.name]
    return [
        *(entry.name for entry in entries[:first_block]),
        *(name.format(i=i) for i in range(config.depth) for name in blocks),
        *(entry.name for entry in entries[first_block + len(blocks) :]),
    ]


def positions(config: DiTConfig) -> np.ndarray:
    """The fixed table `pos_embed`, (1, N, D)."""
    return sincos_positions(config.hidden_size, config.input_size // config.patch_size)[None]


def describe(config: DiTConfig) -> str:
    """The architecture for people."""
    return (
        f"a DiT with depth={config.depth}, hidden_size={config.hidden_size}, patch_size={config.patch_size}, "
        f"in_channels={config.in_channels}, num_classes={config.num_classes}, input_size={config.input_size}"
    )


def _check(config: DiTConfig, state_dict: Mapping[str, np.ndarray]) -> None:
    """Raise InputError, naming the tensors, unless the state dict is that of the architecture."""
    expected = _shapes(config)
    if missing := [name for name in expected if name not in state_dict and name != "pos_embed"]:
        raise InputError(f"the state dict lacks {_some(missing)}, which {describe(config)} has")
    if extra := sorted(state_dict.keys() - expected):
        raise InputError(f"the state dict holds {_some(extra)}, which {describe(config)} does not have")
    if wrong := [
        f"{name} has shape {state_dict[name].shape} where {shape} is expected"
        for name, shape in expected.items()
        if name in state_dict and state_dict[name].shape != shape
    ]:
        raise InputError(f"the state dict is not of {describe(config)}: {_some(wrong)}")
    # An average of the table drifts by rounding, and bfloat16 rounds it by up to 2^-9.
    if "pos_embed" in state_dict and not np.allclose(state_dict["pos_embed"], positions(config), atol=4e-3):
        raise InputError("pos_embed is not the fixed sin-cos table: weights with trained positions are not DiT's")


def _shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict."""
    _, abstract = abstract_dit(config)
    shapes = {"pos_embed": positions(config).shape}
    entries = {entry.name: entry for entry in table(config)}
    ours = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
    for name, entry in entries.items():
        leaf = np.broadcast_to(np.float32(0), ours[entry.path])
        if "{i}" not in name:
            shapes[name] = entry.to_torch(leaf).shape
            continue
        for i, heads in enumerate(config.block_heads):
            part = first_heads(entry.path, leaf[i], heads, config.num_heads)
            shapes[name.format(i=i)] = entry.to_torch(part).shape
    return shapes


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
