"""The training loop: one for every model, data set and mesh."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dit_jax.checkpoints.codec import IDENTITY
from dit_jax.checkpoints.store import CheckpointStore
from dit_jax.config import DiTConfig, require_ranges
from dit_jax.data.loader import Loader
from dit_jax.data.sources import Source, open_source
from dit_jax.errors import InputError
from dit_jax.files import make_folder, replacing
from dit_jax.parallel import processes
from dit_jax.parallel.chips import peak_flops
from dit_jax.parallel.memory import memory_for_copy
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.sharding import batch_sharding, require_shards
from dit_jax.sampling.generate import image_keys, make_generate
from dit_jax.sampling.pictures import save_grid
from dit_jax.training import resume
from dit_jax.training.evaluating import make_evaluation
from dit_jax.training.fine_tune import first_state
from dit_jax.training.flops import train_flops
from dit_jax.training.inputs import Inputs, open_inputs
from dit_jax.training.metrics import NotFiniteError, TrainingLog
from dit_jax.training.step import make_train_step


class DivergedError(Exception):
    """The loss or the gradient is not finite; the message names the step and the last good checkpoint."""


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Train until `config.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Returns the step reached: less than `config.steps` after SIGTERM or Ctrl-C, in whichever process. Leaves in
    `workdir`: config.json, checkpoints/, metrics.jsonl, tensorboard/ and previews/. Raises InputError where settings,
    data and checkpoint do not fit together, and DivergedError.
    """
    mesh, source = make_mesh(config.mesh), open_source(config.data.source)
    inputs = open_inputs(config, source)
    check(config, source, inputs, mesh)
    workdir, frozen = Path(workdir), jax.device_put(inputs.frozen, NamedSharding(mesh, PartitionSpec()))
    train_step, loader = make_train_step(config, mesh, inputs.prepare), make_loader(config, source, inputs, mesh)
    # An unconditional model draws anything, whatever classes its images have.
    class_names = source.class_names if config.model.num_classes > 1 or inputs.context else ("any",)
    preview = make_preview(config, class_names, inputs, workdir / "previews")
    evaluation = make_evaluation(config, mesh, inputs.codec, inputs.context)
    store = CheckpointStore(
        make_folder(workdir) / "checkpoints", keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every
    )
    with closing(store), jax.set_mesh(mesh), processes.stop_signals() as stopping:
        step, state, interval = resume.restore(store, config, mesh) or (0, first_state(config, mesh, class_names), None)
        if processes.is_first():
            with replacing(workdir / "config.json") as temporary:
                temporary.write_text(config.to_json_best_effort(indent=2))
        first = step + 1
        with make_log(config, workdir, mesh, step, interval) as log, loader.batches(step) as batches:
            try:
                while step < config.steps:
                    batch = next(batches)
                    state, metrics = train_step(state, batch, frozen)
                    step += 1
                    log.dispatched(step, metrics)
                    if step == first:
                        with log.pause():
                            copy_to = memory_for_copy(state, train_step, state, batch, frozen)
                            store.prepare(resume.parts(state), copy_to)
                    ending = stopping(step) or step == config.steps
                    if due(step, config.preview.every):
                        with log.pause():
                            preview(step, state.ema)
                    if due(step, config.eval.every):
                        with log.pause():
                            log.add(step, evaluation(state.ema))
                    if ending or due(step, config.checkpoint.every):
                        resume.save(
                            store,
                            step,
                            state,
                            config,
                            class_names,
                            log.unfinished(),
                            copy_to=copy_to,
                            autoencoder=inputs.autoencoder,
                        )
                    if ending:
                        log.catch_up()
                        break
            except NotFiniteError as error:
                store.wait()
                good = [str(store.folder / str(step)) for step in store.steps()[:1]]
                raise DivergedError(f"{error}; last good checkpoint: {good[0] if good else 'none yet'}") from error
            if skipped := sum(map(int, processes.gather(str(loader.skipped)))):
                log.say(f"{skipped} images could not be read; others took their places")
        store.wait()
    return step


def check(config: ConfigDict, source: Source, inputs: Inputs, mesh: Mesh) -> None:
    """Raise InputError for settings that are out of their range, or do not fit together."""
    model, classes, (height, width, channels) = DiTConfig(**config.model), len(source.class_names), inputs.shape
    if model.in_channels != channels:
        raise InputError(
            f"{config.data.source} gives {channels} channels, the model takes {model.in_channels}: "
            f"set --config.model.in_channels={channels}"
        )
    if not height == width == model.input_size:
        raise InputError(
            f"{config.data.source} gives {height}x{width}, the model takes {model.input_size}x{model.input_size}: "
            f"set --config.model.input_size={height}"
        )
    if model.num_classes not in (1, classes):
        raise InputError(
            f"{config.data.source} has {classes} classes, the model {model.num_classes}: "
            f"set --config.model.num_classes={classes}, or 1 to train without labels"
        )
    if model.learn_sigma != (config.diffusion.variance == "learned_range"):
        raise InputError(
            f"model.learn_sigma={model.learn_sigma} does not go with diffusion.variance={config.diffusion.variance}: "
            "learned_range needs learn_sigma=True, a fixed variance learn_sigma=False"
        )
    require_ranges(config)
    require_shards(config.batch_size, config.accumulate, mesh)


def make_loader(config: ConfigDict, source: Source, inputs: Inputs, mesh: Mesh) -> Loader:
    return Loader(
        source,
        image_size=inputs.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        flip=inputs.flip,
        context=inputs.context,
        skip_corrupt=config.data.skip_corrupt,
        threads=config.data.threads,
        sharding=batch_sharding(mesh),
    )


def make_log(config: ConfigDict, workdir: Path, mesh: Mesh, step: int, interval: dict | None) -> TrainingLog:
    peak = peak_flops(mesh.devices.flat[0])
    return TrainingLog(
        workdir,
        first_step=step,
        last_step=config.steps,
        log_every=config.log_every,
        batch_size=config.batch_size,
        flops_per_image=train_flops(DiTConfig(**config.model)),
        peak_flops=peak and peak * mesh.size,
        interval=interval,
    )


def make_preview(
    config: ConfigDict, class_names: Sequence[str], inputs: Inputs, folder: Path
) -> Callable[[int, dict], None]:
    """A function (step, weights) that draws the same images, from the same noise, into `folder` each time."""
    generate = make_generate(DiTConfig(**config.model), config.diffusion, inputs.codec or IDENTITY, **config.sample)
    labels = np.arange(config.preview.count, dtype=np.int32) % len(class_names)
    captions, context = [class_names[label] for label in labels], ()
    if inputs.context:
        captions = inputs.context.in_turn(labels)
        context = inputs.context.tokens(captions)

    def preview(step: int, params: dict) -> None:
        images = generate(params, labels, image_keys(config.seed, 0, len(labels)), *context)
        if processes.is_first():
            save_grid(folder / f"{step:07d}.png", np.asarray(images), captions)

    return preview


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
