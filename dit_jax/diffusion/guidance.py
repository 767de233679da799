"""Classifier-free guidance."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.gaussian import Denoiser, GaussianDiffusion
from dit_jax.errors import InputError


def guided(
    model: Any,
    y: jax.Array,
    scale: float | jax.Array = 4.0,
    channels: int | None = 3,
    context: jax.Array | None = None,
    context_mask: jax.Array | None = None,
) -> Denoiser:
    """A denoiser with the conditions bound, pushed away from what the model draws without label and context.

    epsilon = unconditional + scale * (conditional - unconditional) (Ho & Salimans 2022, eq. 6, w = scale - 1), on the
    first `channels` noise channels; the other noise channels and those of the variance are the conditional ones.
    Both halves run as one batch, each image next to itself, so that on a mesh no image leaves its device.

    model: called as `model(x, t, y)`, with a context as `model(x, t, y, context, context_mask)`; its `config` tells
        in_channels, num_classes (the null class's id) and class_dropout_prob.
    y: (B,) labels.
    scale: 1 is no guidance, and as a Python number costs no second half.
    channels: 3 as DiT was released; None, or more than there are, guides all.
    context, context_mask: (B, L, F) condition tokens and (B, L) bool, which there are; None: all.
    Raises InputError when the model has no null class and scale is not 1.
    """
    config, y = model.config, jnp.asarray(y)
    told = () if context is None else (context, _mask_of(context, context_mask))
    if _is_one(scale):
        return lambda x, t: model(x, t, y, *told)
    if config.class_dropout_prob == 0:
        raise InputError(
            f"guidance scale is {scale}, but this model has no null class (class_dropout_prob=0); "
            "use scale 1, or a model trained with label dropout."
        )
    if channels is not None and channels < 1:
        raise InputError(f"channels is {channels}; expected the number of guided channels, or None for all.")
    count = config.in_channels if channels is None else min(channels, config.in_channels)
    labels = jnp.stack([y, jnp.full_like(y, config.num_classes)], axis=1).reshape(-1)
    if told:
        context, mask = told
        masks = jnp.stack([mask, jnp.zeros_like(mask)], axis=1).reshape(-1, mask.shape[1])
        told = (jnp.repeat(context, 2, axis=0), masks)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        output = model(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), labels, *told)
        # float32 before the difference, which the scale then magnifies.
        pairs = output.astype(jnp.float32).reshape(-1, 2, *output.shape[1:])
        conditional, unconditional = pairs[:, 0], pairs[:, 1]
        epsilon = unconditional[..., :count] + scale * (conditional - unconditional)[..., :count]
        return jnp.concatenate([epsilon, conditional[..., count:]], axis=-1)

    return denoise


def guided_within(
    interval: Sequence[float],
    diffusion: GaussianDiffusion,
    model: Any,
    y: jax.Array,
    scale: float | jax.Array = 4.0,
    channels: int | None = 3,
    context: jax.Array | None = None,
    context_mask: jax.Array | None = None,
) -> list[Denoiser]:
    """A denoiser for each step of a process, for the samplers: guided in an interval of noise levels only, and outside
    it without the second half (Kynkäänniemi et al. 2024, eq. 5).

    interval: see `guided_steps`. Other arguments: see `guided`.
    """
    within, told = guided_steps(interval, diffusion), (context, context_mask)
    outside = guided(model, y, 1, channels, *told)
    inside = outside if _is_one(scale) else guided(model, y, scale, channels, *told)
    return [inside if chosen else outside for chosen in within]


def guided_steps(interval: Sequence[float], diffusion: GaussianDiffusion) -> np.ndarray:
    """Which steps of a process are guided: (num_steps,) bool.

    interval: (low, high), those of a noise level with low < sigma <= high; empty guides all. sigma is the ratio of
        noise to signal, sqrt(1 / abar - 1): that of the paper, and the same for every schedule and number of steps.
    Raises InputError if it is not an interval, or holds no step.
    """
    if not len(interval):
        return np.ones(diffusion.num_steps, bool)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise InputError(
            f"guidance_interval={tuple(interval)}: expected two noise levels, low,high with 0 <= low < high"
        )
    levels = np.sqrt(1.0 / diffusion.alphas_cumprod - 1.0)
    chosen = (interval[0] < levels) & (levels <= interval[1])
    if not chosen.any():
        raise InputError(
            f"guidance_interval={tuple(interval)} holds none of the {len(levels)} steps, whose noise levels go from "
            f"{levels[0]:.3g} to {levels[-1]:.3g}"
        )
    return chosen


def _mask_of(context: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.ones(context.shape[:2], bool) if mask is None else jnp.asarray(mask)


def _is_one(scale: float | jax.Array) -> bool:
    return isinstance(scale, int | float) and scale == 1
