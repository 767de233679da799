"""What a training run carries from step to step, born in its place on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dit_jax.config import DiTConfig
from dit_jax.models.dit import DiT
from dit_jax.parallel.sharding import state_sharding
from dit_jax.training.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """Plain arrays: the step count, the parameters, their moving average and the optimiser's moments."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: optax.OptState


def abstract_state(config: ConfigDict, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state; nothing is computed."""
    shapes = jax.eval_shape(lambda: _initial(config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes),
    )


def init_state(config: ConfigDict, mesh: Mesh) -> TrainState:
    """The state before the first step; each device makes its own shards, the whole is never in one place."""
    abstract = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: _initial(config), out_shardings=shardings)()


def _initial(config: ConfigDict) -> TrainState:
    model = DiT(DiTConfig(**config.model), rngs=nnx.Rngs(config.seed))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    opt_state = make_optimizer(config).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)
