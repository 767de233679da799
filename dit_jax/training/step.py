"""One training step: the loss of the diffusion, its gradient, AdamW, and the moving average."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dit_jax.config import DiTConfig
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.models.dit import abstract_dit
from dit_jax.parallel.chips import training_options
from dit_jax.parallel.sharding import shard_batch
from dit_jax.training.optimizer import learning_rate, make_optimizer
from dit_jax.training.state import TrainState, abstract_state

Metrics = dict[str, jax.Array]
Prepare = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Examples(NamedTuple):
    """A batch with everything random drawn: x (B,H,W,C), y (B,) with labels dropped, t (B,), noise (B,H,W,C); and for
    a model that takes them, the condition tokens (B,L,F) and which there are (B,L), none in rows without a label."""

    x: jax.Array
    y: jax.Array
    t: jax.Array
    noise: jax.Array
    context: jax.Array | None = None
    context_mask: jax.Array | None = None


def as_read(frozen: Any, key: jax.Array, x: jax.Array) -> jax.Array:
    """Pixels are trained on as they are."""
    return x


def make_train_step(
    config: ConfigDict, mesh: Mesh, prepare: Prepare = as_read
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted step (state, batch, frozen) -> (state, metrics); batch is {"x": ..., "y": (B,)}, split over the mesh,
    with "context" (B, L, F) and "context_mask" (B, L) for a model that takes them.

    `prepare(frozen, key, x)` makes x0 (B, H, W, C) of what was read; by default that is x0 itself and nothing is
    frozen. The state is donated, and comes back as it lay on the mesh. All that is random depends on the seed and the
    step number only, whatever the mesh. Metrics are scalars of this step: loss (of the diffusion), mse, vb, grad_norm,
    param_norm (before the update) and learning_rate; with gated heads also head_gates, how far they are open.
    """
    model_config, diffusion = DiTConfig(**config.model), GaussianDiffusion.create(**config.diffusion)
    update = make_update(config, diffusion)

    def train_step(state: TrainState, batch: dict[str, jax.Array], frozen: Any = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        *keys, input_key = jax.random.split(key, 4)
        x = prepare(frozen, input_key, batch["x"])
        return update(state, draw(keys, batch | {"x": x}, model_config, diffusion.num_steps))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    options = training_options(mesh.devices.flat[0])
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere), compiler_options=options)


def draw(keys: Sequence[jax.Array], batch: dict[str, jax.Array], config: DiTConfig, num_steps: int) -> Examples:
    """Draw the timesteps, the noise and the labels to drop for a batch, each from its key.

    A row without its label is without its context too: guidance pushes away from what knows neither.
    """
    x, y, mask = batch["x"], batch["y"], batch.get("context_mask")
    t_key, noise_key, drop_key = keys
    t = jax.random.randint(t_key, y.shape, 0, num_steps)
    noise = jax.random.normal(noise_key, x.shape)
    dropped = jax.random.bernoulli(drop_key, config.class_dropout_prob, y.shape)
    if config.num_classes == 1:
        y = jnp.zeros_like(y)  # an unconditional model, whatever classes its images have
    mask = None if mask is None else mask & ~dropped[:, None]
    return Examples(x, jnp.where(dropped, config.num_classes, y), t, shard_batch(noise), batch.get("context"), mask)


def make_update(
    config: ConfigDict, diffusion: GaussianDiffusion
) -> Callable[[TrainState, Examples], tuple[TrainState, Metrics]]:
    """The deterministic part of a step."""
    graph, _ = abstract_dit(DiTConfig(**config.model).here)
    optimizer, schedule = make_optimizer(config), learning_rate(config)

    def loss_fn(params: dict, examples: Examples) -> tuple[jax.Array, Metrics]:
        model, gates = nnx.merge(graph, params), None

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            nonlocal gates
            out, gates = model.with_gates(x, t, examples.y, examples.context, examples.context_mask)
            return out

        terms = diffusion.losses(denoise, examples.x, examples.t, examples.noise)
        terms = {name: values.mean() for name, values in terms.items()}
        if gates is None:
            return terms["loss"], terms
        terms["head_gates"] = gates.mean()
        return terms["loss"] + config.head_gate_penalty * terms["head_gates"], terms

    def update(state: TrainState, examples: Examples) -> tuple[TrainState, Metrics]:
        grads, terms = accumulated(jax.grad(loss_fn, has_aux=True), state.params, examples, config.accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - config.ema_decay)
        norms = {"grad_norm": optax.tree.norm(apart(grads)), "param_norm": optax.tree.norm(state.params)}
        metrics = terms | norms | {"learning_rate": jnp.asarray(schedule(state.step), jnp.float32)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return update


def apart(grads: dict) -> dict:
    """The same: without it XLA on CPUs writes the gradients' squares to memory, AdamW's and their norm's in common."""
    return jax.lax.platform_dependent(grads, cpu=jax.lax.optimization_barrier, default=lambda grads: grads)


def accumulated(grad_fn: Callable, params: dict, examples: Examples, parts: int) -> tuple[dict, Metrics]:
    """Mean gradient and terms over `parts` equal parts of the batch, one after the other in one scan.

    A part takes every `parts`-th row, so that each device keeps the rows that it has.
    """
    if parts == 1:
        return grad_fn(params, examples)

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)

    def add(total: tuple, part: Examples) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, jax.tree.map(shard_batch, part))), None

    split_examples = jax.tree.map(split, examples)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(grad_fn, params, jax.tree.map(lambda a: a[0], split_examples)),
    )
    total, _ = jax.lax.scan(add, zeros, split_examples)
    return jax.tree.map(lambda leaf: leaf / parts, total)
