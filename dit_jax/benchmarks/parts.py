"""What `dit_jax.benchmark` measures: each part a function that returns rows."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dit_jax.benchmarks import peers
from dit_jax.benchmarks.rates import Row, compiled, in_turn, peak_memory, row, utilisation
from dit_jax.checkpoints.autoencoder_layout import load_autoencoder
from dit_jax.checkpoints.codec import IDENTITY
from dit_jax.compilation.programs import codec_of, context_of
from dit_jax.config import DiTConfig
from dit_jax.data.sources import open_source
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from dit_jax.models.dit import DiT, abstract_dit
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.sharding import batch_sharding, require_shards
from dit_jax.sampling.generate import image_keys, make_generate, network_passes
from dit_jax.training.flops import forward_macs, train_flops
from dit_jax.training.inputs import open_inputs
from dit_jax.training.loop import make_loader
from dit_jax.training.state import init_state
from dit_jax.training.step import make_train_step

STEPS = 3  # in one measurement of training, and in a profile


def train(config: ConfigDict, repeats: int, profile: str | None) -> list[Row]:
    """The training step on a batch of noise that stays on the devices: what the loader could at most be used for."""
    mesh, model = make_mesh(config.mesh), DiTConfig(**config.model)
    require_shards(config.batch_size, config.accumulate, mesh)
    with jax.set_mesh(mesh):
        batch = jax.device_put(examples(model, config.batch_size), batch_sharding(mesh))
        state = init_state(config, mesh)
        step, compilation = compiled(make_train_step(config, mesh), state, batch, {})

        def steps() -> None:
            nonlocal state
            for _ in range(STEPS):
                state, metrics = step(state, batch, {})
            jax.block_until_ready(metrics)

        (measured,) = in_turn({f"train, batches of {config.batch_size}": steps}, STEPS * config.batch_size, repeats)
        with profiled(profile):
            steps()
    return [measured | utilisation(measured["median"], train_flops(model), mesh.size) | peak_memory() | compilation]


def sample(config: ConfigDict, repeats: int, profile: str | None, peer: str | None) -> list[Row]:
    """Pictures as `config.sample` says, by weights without meaning, decoded where the config works on latents.

    Beside diffusers' network and scheduler with the same weights, on one device, neither decodes."""
    mesh = make_mesh(devices=jax.local_devices()[:1]) if peer else make_mesh(config.mesh)
    require_shards(config.batch_size, 1, mesh)
    model, codec = DiTConfig(**config.model), IDENTITY if peer else codec_of(config)
    with jax.set_mesh(mesh):
        codec = codec._replace(params=filled(zeros, codec.params, mesh))
        params = filled(normal, abstract_dit(model)[1], mesh)
        generate = make_generate(model, config.diffusion, codec, **config.sample)
        _, labels, *context = examples(model, config.batch_size).values()
        keys = image_keys(0, 0, config.batch_size)

        def pictures() -> None:
            jax.block_until_ready(generate(params, labels, keys, *context))

        name = f"sample, {config.batch_size} at once, {config.sample.steps} steps"
        runs: dict[str, Callable[[], Any]] = {name: pictures}
        if peer:
            network = nnx.merge(abstract_dit(model)[0], params)
            runs[f"{name}, diffusers"] = peers.diffusers_sampler(network, config.diffusion, config.sample, labels)
        rows = in_turn(runs, config.batch_size, repeats)
        with profiled(profile):
            pictures()
    passes = network_passes(config.diffusion, **config.sample)
    rows[0] |= utilisation(rows[0]["median"], 2 * forward_macs(model) * passes, mesh.size) | peak_memory()
    return rows


def forward(config: ConfigDict, repeats: int, peer: str | None) -> list[Row]:
    """One forward pass of the network, beside diffusers' DiTTransformer2DModel with the same weights."""
    model = DiT(DiTConfig(**config.model), rngs=nnx.Rngs(0))
    x, y, *context = examples(model.config, config.batch_size).values()
    t = np.full(len(y), 500, np.int32)
    graph, params = nnx.split(model)
    program = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
    inputs = jax.device_put((x, t, y, *context))
    call, compilation = compiled(program, params, *inputs)
    runs: dict[str, Callable[[], Any]] = {"forward, ours": lambda: jax.block_until_ready(call(params, *inputs))}
    if peer:
        runs["forward, diffusers"] = peers.diffusers_dit(model, x, t, y)
    rows = in_turn(runs, config.batch_size, repeats)
    rows[0] |= utilisation(rows[0]["median"], 2 * forward_macs(model.config), 1) | compilation
    return rows


def data(config: ConfigDict, repeats: int) -> list[Row]:
    """Images a second that the loader hands over, the device doing nothing else."""
    config.preview.every = 0  # no autoencoder is needed
    source = open_source(config.data.source)
    loader = make_loader(config, source, open_inputs(config, source), make_mesh(config.mesh))
    with loader.batches(0) as batches:
        next(batches)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < 2.0:  # the threads' first reads, and how many batches are two seconds
            next(batches)
            count += 1
        rates = []
        for _ in range(repeats):
            started = time.perf_counter()
            for _ in range(count):
                next(batches)
            rates.append(count * config.batch_size / (time.perf_counter() - started))
    return [row(f"{config.data.source}, batches of {config.batch_size}", rates)]


def encode(autoencoder: str | None, image_size: int, images: int, repeats: int, peer: str | None) -> list[Row]:
    """Images to moments and back, beside diffusers' AutoencoderKL with the same weights."""
    vae = load_autoencoder(autoencoder) if autoencoder else AutoencoderKL(AutoencoderConfig(), rngs=nnx.Rngs(0))
    rng, side = np.random.default_rng(0), image_size // vae.config.downsample
    x = rng.uniform(-1, 1, (images, image_size, image_size, vae.config.in_channels)).astype(np.float32)
    z = rng.standard_normal((images, side, side, vae.config.latent_channels), dtype=np.float32)
    graph, params = nnx.split(vae)
    to_moments, encoding = compiled(jax.jit(lambda params, x: nnx.merge(graph, params).moments(x)), params, x)
    to_pixels, decoding = compiled(jax.jit(lambda params, z: nnx.merge(graph, params).decode(z)), params, z)
    runs: dict[str, Callable[[], Any]] = {
        "encode, ours": lambda: jax.block_until_ready(to_moments(params, x)),
        "decode, ours": lambda: jax.block_until_ready(to_pixels(params, z)),
    }
    if peer:
        runs |= peers.diffusers_autoencoder(vae, x, z)
    rows = in_turn(runs, images, repeats)
    rows[0] |= encoding | peak_memory()
    rows[1] |= decoding | peak_memory()
    return rows


def examples(model: DiTConfig, count: int) -> dict[str, np.ndarray]:
    """A batch of noise as the step takes it: x, y, and for a model that takes them condition tokens and their mask."""
    if count < 1:
        raise InputError(f"batch_size={count}: expected at least 1")
    rng = np.random.default_rng(0)
    shape = (count, model.input_size, model.input_size, model.in_channels)
    return {
        "x": rng.standard_normal(shape, dtype=np.float32),
        "y": (np.arange(count) % model.num_classes).astype(np.int32),
    } | {name: np.ones(shape.shape, shape.dtype) for name, shape in context_of(model, count).items()}


def normal(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Weights that compute something: those of a new model would give zeros."""
    return 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)


def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype)


def filled(make: Callable[[jax.ShapeDtypeStruct], jax.Array], shapes: Any, mesh: Mesh) -> Any:
    """Arrays of such shapes, made where they are to lie: whole on every device."""
    return jax.jit(lambda: jax.tree.map(make, shapes), out_shardings=NamedSharding(mesh, PartitionSpec()))()


def profiled(folder: str | None) -> contextlib.AbstractContextManager:
    """A trace for XProf in `folder`, if it is given."""
    return jax.profiler.trace(folder) if folder else contextlib.nullcontext()
