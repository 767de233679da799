"""Weights from wherever they are kept. So far: a training run's folder."""

from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from dit_jax.checkpoints.store import CheckpointStore
from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.dit import DiT, abstract_dit


class Weights(NamedTuple):
    """A network's parameters and what is known of their making."""

    config: DiTConfig
    params: dict
    """Nested dict of arrays, as `abstract_dit(config)` has it."""
    run: ConfigDict
    """The config of the run that trained them."""
    class_names: list[str]
    origin: str
    """For people: which file or checkpoint this is."""


def load_dit(path: str | Path, weights: str = "ema") -> DiT:
    """The model of a training run's newest checkpoint.

    weights: "ema" for the averaged ones, "model" for the raw ones. Raises InputError if there is nothing to read.
    """
    loaded = load_weights(path, weights)
    graph, _ = abstract_dit(loaded.config)
    return nnx.merge(graph, loaded.params)


def load_weights(path: str | Path, weights: str = "ema", sharding: jax.sharding.Sharding | None = None) -> Weights:
    """As `load_dit`, before the model is put together; arrays are placed by `sharding`, or on the first device."""
    folder = Path(path) / "checkpoints"
    if weights not in ("ema", "model"):
        raise InputError(f"weights={weights!r}: expected ema or model")
    if not folder.is_dir():
        found = "there is nothing of that name" if not Path(path).exists() else "it has no checkpoints/ in it"
        raise InputError(f"{path} is not the folder of a training run ({found}); give the --workdir of a run")
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(record: dict) -> dict:
        _, shapes = abstract_dit(DiTConfig(**record["config"]["model"]))
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        return {weights: jax.tree.map(place, shapes)}

    store = CheckpointStore(folder, write=False)
    try:
        restored = store.restore_newest(abstract)
    finally:
        store.close()
    if restored is None:
        raise InputError(f"{path} has no checkpoint yet: let the run reach its first one")
    step, record, trees = restored
    run = ConfigDict(record["config"])
    origin = f"{path} at step {step}, {'averaged' if weights == 'ema' else 'raw'} weights"
    return Weights(DiTConfig(**run.model), trees[weights], run, record["class_names"], origin)
