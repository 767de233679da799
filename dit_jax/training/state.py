"""What a training run carries from step to step, born in its place on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from dit_jax.config import DiTConfig
from dit_jax.models.dit import DiT
from dit_jax.parallel.sharding import state_sharding


@struct.dataclass
class TrainState:
    """Plain arrays: the step count, the parameters, their moving average and the optimiser's moments."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: optax.OptState


def abstract_state(config: DiTConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state; nothing is computed."""
    shapes = jax.eval_shape(lambda: _initial(config, optimizer, 0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes),
    )


def init_state(config: DiTConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step; each device makes its own shards, the whole is never in one place."""
    abstract = abstract_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: _initial(config, optimizer, seed), out_shardings=shardings)()


def _initial(config: DiTConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    params = nnx.to_pure_dict(nnx.state(DiT(config, rngs=nnx.Rngs(seed)), nnx.Param))
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
