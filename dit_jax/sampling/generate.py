"""From labels and keys to pictures, in one compiled program."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.checkpoints.codec import IDENTITY, Codec
from dit_jax.config import DiTConfig
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.guidance import guided_steps, guided_within
from dit_jax.diffusion.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, initial_noise
from dit_jax.errors import InputError
from dit_jax.models.dit import abstract_dit
from dit_jax.parallel.sharding import replicate, shard_batch

SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample, "dpm-solver++": dpm_solver_sample}

Generate = Callable[..., jax.Array]
"""(params, labels (B,), keys (B,), and for a model that takes them condition tokens (B, L, F) and their mask (B, L)) ->
(B, H, W, C) uint8 pictures."""


def make_generate(
    config: DiTConfig,
    process: Mapping[str, Any],
    codec: Codec = IDENTITY,
    **settings: Any,
) -> Generate:
    """What draws pictures; image b depends on its conditions and its key only.

    All of it, the decoding too, is one compiled program: `make_program`, whose arguments these are.
    """
    generate = make_program(config, process, codec, **settings)
    return lambda params, labels, keys, *context: generate(params, codec.params, labels, keys, *context)


def make_program(
    config: DiTConfig,
    process: Mapping[str, Any],
    codec: Codec,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    guidance_channels: int,
    clip_denoised: bool,
    guidance_interval: Sequence[float] = (),
) -> Callable[..., jax.Array]:
    """The jitted (params, decoder's params, labels (B,), keys (B,), and tokens and mask) -> (B, H, W, C) uint8.

    Args:
        config: the model's.
        process: the diffusion it was trained with, as the fields of `config.diffusion`.
        codec: what makes pictures of the network's latents.
        sampler: "ddpm", "ddim" or "dpm-solver++".
        steps: evenly spaced steps, of those of training.
        guidance: scale; 1 is none.
        guidance_channels: guided noise channels, from the first; 0 guides all.
        clip_denoised: keep the predicted picture within [-1, 1] at every step; for pixels, not for latents.
        guidance_interval: noise levels (low, high) that are guided, see `guidance.guided_steps`; empty guides all.
            Records from before it was there lack it.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler={sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if not math.isfinite(guidance):
        raise InputError(f"guidance={guidance}: expected a finite number; 1 is none")
    diffusion = GaussianDiffusion.create(respacing=str(steps), **process)
    guided_steps(guidance_interval, diffusion)  # raises before anything is computed
    graph, _ = abstract_dit(config)
    shape = (config.input_size, config.input_size, config.in_channels)

    @jax.jit
    def generate(
        params: Any,
        decoder: Any,
        labels: jax.Array,
        keys: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
    ) -> jax.Array:
        model = nnx.merge(graph, params)
        model.blocks = model.blocks_in(config.precision.results)  # once: XLA's GPU compiler would do it in each step
        if config.num_classes == 1:
            labels = jnp.zeros_like(labels)  # an unconditional model, whatever classes its context names
        conditions = (labels, guidance, guidance_channels or None, context, context_mask)
        denoise = guided_within(guidance_interval, diffusion, model, *conditions)
        x_T = shard_batch(initial_noise(keys, shape))
        latents = SAMPLERS[sampler](diffusion, denoise, x_T, keys, clip_denoised=clip_denoised)
        return replicate(codec.decode(decoder, latents, to_uint8))

    return generate


def network_passes(
    process: Mapping[str, Any], *, steps: int, guidance: float, guidance_interval: Sequence[float] = (), **_: Any
) -> int:
    """How often the network runs for an image drawn with these settings (`make_program`): two make a guided step."""
    diffusion = GaussianDiffusion.create(respacing=str(steps), **process)
    return steps + (int(guided_steps(guidance_interval, diffusion).sum()) if guidance != 1 else 0)


def image_keys(seed: int, first: int, count: int) -> jax.Array:
    """Keys of the images `first` to `first + count - 1` of a seed: (count,)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(first, first + count))


def random_labels(seed: int, count: int, classes: int) -> jax.Array:
    """A label for each of the first `count` images of a seed, every class as likely: (count,) int32."""
    # Folded into an image's key, far above the steps and beside x_T: no noise comes from the same stream.
    draw = lambda key: jax.random.randint(jax.random.fold_in(key, 2**31 - 2), (), 0, classes)  # noqa: E731
    return jax.vmap(draw)(image_keys(seed, 0, count))


def in_batches(rows: np.ndarray, batch: int) -> np.ndarray:
    """rows: (count, ...) -> as many whole batches as hold them, filled up with the first rows again."""
    return np.resize(rows, (-(-len(rows) // batch) * batch, *rows.shape[1:]))


def to_uint8(x: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> 0..255, clipped and truncated as DiT's released sampling does."""
    return jnp.clip(127.5 * x + 128.0, 0, 255).astype(jnp.uint8)
