"""Classifier-free guidance."""

from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.diffusion.gaussian import Denoiser
from dit_jax.errors import InputError


def guided(model: Any, y: jax.Array, scale: float | jax.Array = 4.0, channels: int | None = 3) -> Denoiser:
    """A denoiser with the labels bound, pushed away from what the model draws without a label.

    epsilon = unconditional + scale * (conditional - unconditional) (Ho & Salimans 2022, eq. 6, w = scale - 1), on the
    first `channels` noise channels; the other noise channels and those of the variance are the conditional ones.
    Both halves run as one batch, each image next to itself, so that on a mesh no image leaves its device.

    model: called as `model(x, t, y)`; its `config` tells in_channels, num_classes (the null class's id) and
        class_dropout_prob.
    y: (B,) labels.
    scale: 1 is no guidance, and as a Python number costs no second half.
    channels: 3 as DiT was released; None, or more than there are, guides all.
    Raises InputError when the model has no null class and scale is not 1.
    """
    config, y = model.config, jnp.asarray(y)
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: model(x, t, y)
    if config.class_dropout_prob == 0:
        raise InputError(
            f"guidance scale is {scale}, but this model has no null class (class_dropout_prob=0); "
            "use scale 1, or a model trained with label dropout."
        )
    if channels is not None and channels < 1:
        raise InputError(f"channels is {channels}; expected the number of guided channels, or None for all.")
    count = config.in_channels if channels is None else min(channels, config.in_channels)
    labels = jnp.stack([y, jnp.full_like(y, config.num_classes)], axis=1).reshape(-1)

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        output = model(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), labels)
        # float32 before the difference, which the scale then magnifies.
        pairs = output.astype(jnp.float32).reshape(-1, 2, *output.shape[1:])
        conditional, unconditional = pairs[:, 0], pairs[:, 1]
        epsilon = unconditional[..., :count] + scale * (conditional - unconditional)[..., :count]
        return jnp.concatenate([epsilon, conditional[..., count:]], axis=-1)

    return denoise
