"""Weights from and to wherever they are kept."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.checkpoints import architecture, diffusers_layout, orbax_folder, published, torch_layout
from dit_jax.checkpoints.record import Record
from dit_jax.checkpoints.store import read_newest
from dit_jax.checkpoints.tensor_files import (
    PICKLES,
    RECORD,
    SAFETENSORS,
    from_torch,
    read_pickle,
    read_tensors,
    write_tensors,
)
from dit_jax.checkpoints.torch_layout import Leaf
from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.dit import DiT, abstract_dit

Shardings = Callable[[dict], dict]
"""From the tree of shapes of a network's parameters to one of shardings."""


class Weights(NamedTuple):
    """A network's parameters, one at a time, and what is known of them."""

    record: Record
    leaves: Iterator[Leaf]
    """To be gone through once. The arrays are JAX's or NumPy's, as is nearest to the file."""
    path: Path
    """Where the numbers themselves are: the file, or the folder that holds nothing else."""
    vae: Path | None
    """A folder with the autoencoder that came along, in diffusers' layout."""

    @property
    def origin(self) -> str:
        """For people: where they are, which, and from when."""
        kind = {"ema": ", averaged weights", "model": ", raw weights", None: ""}[self.record.weights]
        return f"{self.path}{kind}" + ("" if self.record.step is None else f" at step {self.record.step}")

    def with_model(self, **fields: str | None) -> "Weights":
        """The same weights in a network of which these fields differ; one that is None stays as it is."""
        given = {field: value for field, value in fields.items() if value is not None}
        model = dataclasses.replace(self.record.model, **given)
        return self._replace(record=dataclasses.replace(self.record, model=model))

    def params(self, shardings: Shardings | None = None) -> dict:
        """The parameters as `abstract_dit(record.model)` has them, placed as asked, or on the first device."""
        places = None
        if shardings is not None:
            _, shapes = abstract_dit(self.record.model)
            places = flatten_dict(shardings(shapes), sep="/")
        put = lambda path, leaf: jnp.asarray(leaf) if places is None else jax.device_put(leaf, places[path])  # noqa: E731
        return unflatten_dict({path: put(path, leaf) for path, leaf in self.leaves}, sep="/")


def load_dit(
    path: str | Path, weights: str | None = None, attention: str | None = None, dtype: str | None = None, **known: int
) -> DiT:
    """The model in a .pt or .safetensors file, a folder of diffusers or of `save_dit`, or a training run.

    Args:
        path: the file or folder, or a name that `dit_jax.download` has fetched.
        weights: "ema" or "model", of what holds both, such as a run; default: "ema".
        attention: another schedule than it was trained with (`DiTConfig.attention`); any takes the same weights.
        dtype: another than is on record, of matrix products (`DiTConfig.dtype`).
        known: num_heads, num_classes, input_size, where the file does not tell (`architecture.infer`).

    Raises InputError if there is no such thing, it is damaged, or it is not a DiT.
    """
    opened = open_weights(path, weights, **known)
    require(opened, known)
    graph, _ = abstract_dit(opened.with_model(attention=attention, dtype=dtype).record.model)
    return nnx.merge(graph, opened.params())


def save_dit(model: DiT, path: str | Path) -> None:
    """Write a model: `.pt` and `.safetensors` with the official names, `diffusers:FOLDER`, or else a folder of Orbax
    arrays with a record. Raises InputError if it cannot be written."""
    params = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/")
    write_weights(path, Record.of(model.config), iter(params.items()))


def open_weights(
    path: str | Path, weights: str | None = None, shardings: Shardings | None = None, **known: int
) -> Weights:
    """What `load_dit` loads, before it is loaded.

    `known` is heard where the file leaves something open. shardings: where arrays of a run or of Orbax are born.
    """
    if weights not in (None, "ema", "model"):
        raise InputError(f"weights={weights!r}: expected ema or model")
    path = find(path)
    if not path.is_dir():
        opened = _open_file(path, weights, known)
    elif is_run(path):
        opened = _open_run(path, weights or "ema", shardings)
    elif (path / orbax_folder.RECORD).is_file():
        record, sums = orbax_folder.read_record(path)
        leaves = orbax_folder.read_folder(path, record, sums, shardings or _first_device)
        vae = path / "vae"
        opened = Weights(record, leaves, path / "weights", vae if vae.is_dir() else None)
    else:
        opened = _open_diffusers(path, known)
    if weights not in (None, opened.record.weights):
        held = opened.record.weights and f"holds {opened.record.weights!r} weights"
        raise InputError(f"{path} {held or 'does not say which weights it holds'}; {weights!r} was asked for")
    return opened


def require(opened: Weights, known: dict[str, int]) -> None:
    """Raise InputError where what was found is not what the user said it is."""
    for name, value in known.items():
        if getattr(opened.record.model, name) != value:
            raise InputError(f"{opened.path} has {name}={getattr(opened.record.model, name)}; {value} was given")


def from_state_dict(
    tensors: dict[str, np.ndarray], fields: dict, known: dict[str, int], path: Path
) -> tuple[Record, Iterator[Leaf]]:
    """The record that came along as `fields`, or else what the shapes tell; and the parameters. Empties `tensors`."""
    try:
        if fields:
            record = Record.from_json(fields)
        else:
            record = Record.of(architecture.infer({name: a.shape for name, a in tensors.items()}, **known))
        return record, torch_layout.to_leaves(record.model, tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_weights(path: str | Path, record: Record, leaves: Iterable[Leaf], vae: Path | None = None) -> None:
    """Write weights in the format that `path` names, as `save_dit` does."""
    written = format_of(path)
    if written == "diffusers":
        diffusers_layout.transformer_config(record.model)  # raises before the work is done
    if written == "orbax":
        orbax_folder.write_folder(Path(path), record, leaves, vae)
        return
    state_dict = torch_layout.from_leaves(record.model, leaves)
    if written == "diffusers":
        folder = Path(str(path).removeprefix("diffusers:"))
        diffusers_layout.write_folder(folder, record, state_dict, vae)
    else:
        write_tensors(Path(path), state_dict, record.to_json())


def format_of(path: str | Path) -> str:
    """What a name asks for: "pytorch", "safetensors", "diffusers", or else "orbax"."""
    if str(path).startswith("diffusers:"):
        return "diffusers"
    suffix = Path(path).suffix
    return "safetensors" if suffix == SAFETENSORS else "pytorch" if suffix in PICKLES else "orbax"


def is_run(path: Path) -> bool:
    """Whether this is the folder of a training run."""
    return (path / "checkpoints").is_dir()


def find(path: str | Path) -> Path:
    """The file or folder of that path, or where `dit_jax.download` put what was published under that name."""
    if Path(path).exists():
        return Path(path)
    if fetched := published.locate(str(path)):
        return fetched
    if str(path) in published.PUBLISHED:
        raise InputError(f"{path} has not been downloaded yet: run python -m dit_jax.download {path}")
    raise InputError(
        f"there is nothing of that name: {path}; expected a file or folder of weights, the --workdir of a run, or a "
        "name that dit_jax.download has fetched"
    )


def _open_file(path: Path, weights: str | None, known: dict[str, int]) -> Weights:
    """A file of tensors, or PyTorch's training checkpoint."""
    if path.suffix not in (SAFETENSORS, *PICKLES):
        raise InputError(f"{path} has no suffix of weights: expected {', '.join((SAFETENSORS, *PICKLES))}, or a folder")
    content = read_pickle(path) if path.suffix in PICKLES else None
    if is_training_checkpoint(content):
        chosen = weights or "ema"
        if chosen not in content:
            raise InputError(f"{path} has no {chosen!r} weights; it holds {', '.join(map(str, content))}")
        tensors, _ = from_torch(content[chosen], path)
        fields = content.get(RECORD, {})
        del content  # the other weights and the moments
    else:
        chosen = None
        tensors, fields = read_tensors(path) if content is None else from_torch(content, path)
    record, leaves = from_state_dict(tensors, fields, known, path)
    return Weights(dataclasses.replace(record, weights=chosen or record.weights), leaves, path, None)


def _open_diffusers(path: Path, known: dict[str, int]) -> Weights:
    found = diffusers_layout.read_folder(path)
    record, leaves = from_state_dict(found.state_dict, found.record, found.known | known, found.weights_file)
    if not found.record:
        record = dataclasses.replace(record, diffusion=record.diffusion | found.diffusion)
        if len(found.class_names) == record.model.num_classes:
            record = dataclasses.replace(record, class_names=found.class_names)
    return Weights(record, leaves, found.weights_file, found.vae)


def _open_run(path: Path, weights: str, shardings: Shardings | None) -> Weights:
    """The newest readable checkpoint of a training run."""

    def abstract(record: dict) -> dict:
        _, shapes = abstract_dit(DiTConfig(**record["config"]["model"]))
        places = (shardings or _first_device)(shapes)
        shaped = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        return {weights: jax.tree.map(shaped, shapes, places)}

    step, fields, trees = read_newest(path, abstract)
    run = fields["config"]
    record = Record(
        DiTConfig(**run["model"]),
        run["diffusion"],
        run["sample"],
        fields["class_names"],
        run.get("context", ""),
        weights=weights,
        autoencoder=fields.get("autoencoder"),
        step=step,
    )
    params = flatten_dict(trees.pop(weights), sep="/")
    order = sorted(params, key=lambda name: params[name].size)
    return Weights(
        record, ((name, params.pop(name)) for name in order), path / "checkpoints" / str(step) / weights, None
    )


def is_training_checkpoint(content: Any) -> bool:
    """Whether this is what the official `train.py` saves: state dicts named model and ema, and more."""
    return isinstance(content, dict) and any(isinstance(content.get(name), dict) for name in ("ema", "model"))


def _first_device(shapes: dict) -> dict:
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
