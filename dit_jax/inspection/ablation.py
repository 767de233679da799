"""Which heads matter: how the loss changes when one is taken out and nothing else changes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.inspection.explicit import Inputs, attention_weights, explicit_forward, join_heads, weighted
from dit_jax.inspection.images import Images, noise_like
from dit_jax.inspection.observe import images_at_once
from dit_jax.models.dit import DiT
from dit_jax.models.kernels import split_heads

MASKS_AT_ONCE = 64  # heads taken out, one after the other, by one call


class Importance(NamedTuple):
    """Of every head, from paired losses: the same images, timesteps and noise with it and without.

    The first of 1 + T is the mean over the timesteps, then each of them.
    """

    loss: np.ndarray
    """(1 + T,): the mean loss of the whole network."""
    change: np.ndarray
    """(1 + T, depth, heads): how much more it is without the head; 0 of heads that a block does not have."""
    error: np.ndarray
    """(1 + T, depth, heads): the standard error of that change over images."""


def head_importance(
    model: DiT,
    diffusion: GaussianDiffusion,
    images: Images,
    timesteps: Sequence[int],
    progress: Callable[[int], None] = lambda passes: None,
) -> Importance:
    """Losses with all heads and without each of them, at (T,) steps of the process.

    Image b has the same noise at every timestep, by its index alone. `progress` is told how many passes over one image
    were done, of 1 + the number of heads for each image and timestep.
    """
    x0, y, noise = images.x0, images.labels, noise_like(images.x0)
    depth, heads, together = model.config.depth, model.config.num_heads, images_at_once(model.config)
    without_one = 1 - np.eye(depth * heads)[model.config.head_exists.reshape(-1)]
    masks = np.concatenate([np.ones((1, depth * heads)), without_one]).astype(np.float32)
    masks = masks.reshape(-1, depth, heads)
    losses = np.empty((len(timesteps), len(x0), len(masks)))
    for first in range(0, len(x0), together):
        some = slice(first, first + together)
        for i, t in enumerate(timesteps):
            for mask in range(0, len(masks), MASKS_AT_ONCE):
                few = masks[mask : mask + MASKS_AT_ONCE]
                found = losses_under_masks(model, diffusion, x0[some], y[some], int(t), noise[some], few)
                losses[i, some, mask : mask + MASKS_AT_ONCE] = np.asarray(found).T
                progress(found.size)
    losses = np.concatenate([losses.mean(axis=0, keepdims=True), losses])
    change = losses[..., 1:] - losses[..., :1]
    found = change.mean(axis=1), change.std(axis=1, ddof=min(1, len(x0) - 1)) / np.sqrt(len(x0))
    by_head = np.zeros((2, len(losses), depth, heads))
    by_head[..., model.config.head_exists] = found
    return Importance(losses[..., 0].mean(axis=1), *by_head)


@partial(jax.jit, static_argnames="diffusion")
def losses_under_masks(
    model: DiT,
    diffusion: GaussianDiffusion,
    x0: jax.Array,
    y: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    masks: jax.Array,
) -> jax.Array:
    """masks: (M, depth, heads), a factor for what each head puts out -> (M, B) losses as training has them.

    One compiled program, one mask after the other.
    """

    def visit(block, tokens, modulation, conditions, seen, mask):
        def attend(qkv: jax.Array, head_dim: int) -> jax.Array:
            q, k, v = (part.swapaxes(1, 2) for part in split_heads(qkv, head_dim))
            out = weighted(attention_weights(q, k, seen), v)
            return join_heads(out * mask[:, None, None].astype(out.dtype))

        return block(tokens, modulation, conditions, attend)[0], None

    def losses(mask: jax.Array) -> jax.Array:
        denoise = lambda x, t: explicit_forward(model, Inputs(x, t, y), visit, mask)[0]  # noqa: E731
        return diffusion.losses(denoise, x0, jnp.broadcast_to(t, len(x0)), noise)["loss"]

    return jax.lax.map(losses, masks)
