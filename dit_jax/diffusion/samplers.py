"""Samplers: each is a `lax.scan` over tables of its steps, with one step function.

Shared arguments:
    diffusion: the process, respaced or not. Its n = num_steps steps run from the noisiest down.
    denoise: `denoise(x, t)`, with t in original timesteps, as in `gaussian`; or a list with one for each step of the
        process, entry 0 for the least noisy. Steps in a row with the same one are one scan.
    x_T: (B, H, W, C) starting noise, see `initial_noise`.
    keys: (B,) keys. Image b draws its i-th noise from `fold_in(keys[b], i)`, so it depends on its own key only:
        not on the batch, nor on how the batch is spread over devices. None if no noise is drawn, or `noise` given.
    clip_denoised: clip the predicted x_0 to [-1, 1]; for pixels, not for latents.
    denoised_fn: applied to the predicted x_0 before the clip.
    cond_fn: `cond_fn(x, t)`, the gradient of a log-likelihood to sample towards, t in original timesteps.
    noise: (n, B, H, W, C), used in that order in place of the keys, for exact replay.
    trajectory_every: k asks for `(x_0, trajectory)`, the trajectory being the states after k, 2k, ... steps and
        after the last: (ceil(n / k), B, H, W, C). Other states are not kept.

Each returns x_0, (B, H, W, C) in float32, and raises InputError for arguments that do not fit one another.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.gaussian import Denoiser, GaussianDiffusion
from dit_jax.errors import InputError

# Folded into a key for x_T: no process has so many steps, so no step draws from the same stream.
_INITIAL = 2**31 - 1

Images = jax.Array | tuple[jax.Array, jax.Array]


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal x_T, one image a key, independent of the noise of the steps: (B,) keys -> (B, *shape)."""
    return _draw(keys, _INITIAL, shape)


def ddpm_sample(
    diffusion: GaussianDiffusion,
    denoise: Denoiser | Sequence[Denoiser],
    x_T: jax.Array,
    keys: jax.Array | None,
    clip_denoised: bool = False,
    denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
    cond_fn: Denoiser | None = None,
    noise: jax.Array | None = None,
    trajectory_every: int | None = None,
) -> Images:
    """Ancestral sampling (Ho et al. 2020, alg. 2; with cond_fn, Dhariwal & Nichol 2021, alg. 1).

    Arguments and result: see the module.
    """

    def step(denoise, x, _, t, scale, draw):
        times = diffusion.original_timesteps(t, len(x))
        posterior = diffusion.p_mean_variance(denoise(x, times), x, t, clip_denoised, denoised_fn)
        mean = posterior.mean
        if cond_fn is not None:
            mean = mean + posterior.variance * cond_fn(x, times)
        return mean + scale * jnp.exp(0.5 * posterior.log_variance) * draw(), None

    steps = np.arange(diffusion.num_steps)[::-1]
    if keys is None and noise is None:
        raise InputError("ddpm_sample has neither keys nor noise; give it one key an image, or the noise itself.")
    return _scan(step, denoise, x_T, steps, steps > 0, keys, noise, trajectory_every)


def ddim_sample(
    diffusion: GaussianDiffusion,
    denoise: Denoiser | Sequence[Denoiser],
    x_T: jax.Array,
    keys: jax.Array | None,
    eta: float = 0.0,
    clip_denoised: bool = False,
    denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
    cond_fn: Denoiser | None = None,
    noise: jax.Array | None = None,
    trajectory_every: int | None = None,
) -> Images:
    """Implicit sampling (Song et al. 2021, eq. 12; with cond_fn, Dhariwal & Nichol 2021, alg. 2).

    eta: a number from 0, where nothing is drawn and keys may be None, to 1, as noisy as the true posterior.
    Other arguments and result: see the module.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta is {eta}; expected 0 (deterministic) to 1.")
    if eta > 0.0 and keys is None and noise is None:
        raise InputError(f"ddim_sample with eta={eta} has neither keys nor noise; give one key an image, or eta=0.")
    abar, previous = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    # Song et al. 2021, eq. 16.
    sigma = eta * np.sqrt((1.0 - previous) / (1.0 - abar)) * np.sqrt(1.0 - abar / previous)
    tables = np.sqrt(previous), np.sqrt(1.0 - previous - sigma**2), np.sqrt(1.0 - abar), sigma

    def step(denoise, x, _, t, table, draw):
        signal, direction, deviation, sigma = table
        times = diffusion.original_timesteps(t, len(x))
        x_start = diffusion.predict_x_start(denoise(x, times), x, t, clip_denoised, denoised_fn)
        epsilon = diffusion.epsilon_from_x_start(x, t, x_start)
        if cond_fn is not None:
            epsilon = epsilon - deviation * cond_fn(x, times)
            x_start = diffusion.x_start_from_epsilon(x, t, epsilon)
        x = signal * x_start + direction * epsilon
        return (x if eta == 0.0 else x + sigma * draw()), None

    steps = np.arange(diffusion.num_steps)[::-1]
    return _scan(step, denoise, x_T, steps, [table[steps] for table in tables], keys, noise, trajectory_every)


def dpm_solver_sample(
    diffusion: GaussianDiffusion,
    denoise: Denoiser | Sequence[Denoiser],
    x_T: jax.Array,
    keys: jax.Array | None = None,
    clip_denoised: bool = False,
    denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
    cond_fn: Denoiser | None = None,
    trajectory_every: int | None = None,
) -> Images:
    """DPM-Solver++(2M): the path of DDIM, to second order in the step (Lu et al. 2022, arXiv 2211.01095, alg. 2).

    Each step extrapolates the predicted x_0 from the step before. The first has none before it, and for the last,
    which ends without noise at an infinite signal-to-noise ratio, there is no extrapolation: both are DDIM's. With
    evenly spaced timesteps, the step before the last one spans much of the log of that ratio and may overshoot.
    Nothing is drawn: keys are there for the samplers' common call and change nothing. cond_fn is applied as DDIM's is.
    Other arguments and result: see the module.
    """
    abar, previous = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    log_snr = 0.5 * np.log(abar / (1.0 - abar))  # lambda in the paper
    h = log_snr[:-1] - log_snr[1:]  # of the steps from 1 to n - 1
    extrapolation = np.zeros(diffusion.num_steps)  # 1 / (2 r) in the paper
    extrapolation[1:-1] = h[:-1] / (2.0 * h[1:])
    decay = np.sqrt((1.0 - previous) / (1.0 - abar))
    gain = np.sqrt(previous) * (1.0 - np.exp(-np.append(np.inf, h)))
    tables = decay, gain, extrapolation, np.sqrt(1.0 - abar)

    def step(denoise, x, before, t, table, _):
        decay, gain, extrapolation, deviation = table
        times = diffusion.original_timesteps(t, len(x))
        x_start = diffusion.predict_x_start(denoise(x, times), x, t, clip_denoised, denoised_fn)
        if cond_fn is not None:
            epsilon = diffusion.epsilon_from_x_start(x, t, x_start) - deviation * cond_fn(x, times)
            x_start = diffusion.x_start_from_epsilon(x, t, epsilon)
        return decay * x + gain * (x_start + extrapolation * (x_start - before)), x_start

    steps, nothing = np.arange(diffusion.num_steps)[::-1], jnp.zeros(x_T.shape, jnp.float32)
    return _scan(
        step, denoise, x_T, steps, [table[steps] for table in tables], trajectory_every=trajectory_every, memory=nothing
    )


def ddim_invert(
    diffusion: GaussianDiffusion,
    denoise: Denoiser | Sequence[Denoiser],
    x_0: jax.Array,
    clip_denoised: bool = False,
    num_steps: int | None = None,
) -> jax.Array:
    """The noise from which `ddim_sample` with eta 0 draws x_0, nearly: the more steps, the nearer.

    Step i takes x from level i to i + 1 of the process by Song et al. 2021, eq. 14, x_0 counting as level 0.

    num_steps: how many, from the start; n - 1 if None, which ends at level n - 1, where `ddim_sample` begins. n goes
        one further, to pure noise (a cumulative alpha of 0).
    Other arguments and result: see the module.
    """
    count = diffusion.num_steps - 1 if num_steps is None else num_steps
    if not 0 <= count <= diffusion.num_steps:
        raise InputError(f"num_steps is {num_steps}; this process has {diffusion.num_steps}.")
    following = diffusion.alphas_cumprod_next

    def step(denoise, x, memory, t, table, draw):
        signal, direction = table
        output = denoise(x, diffusion.original_timesteps(t, len(x)))
        x_start = diffusion.predict_x_start(output, x, t, clip_denoised)
        return signal * x_start + direction * diffusion.epsilon_from_x_start(x, t, x_start), None

    tables = [np.sqrt(following)[:count], np.sqrt(1.0 - following)[:count]]
    return _scan(step, denoise, x_0, np.arange(count), tables)


def _scan(
    step: Callable[..., tuple[jax.Array, Any]],
    denoise: Denoiser | Sequence[Denoiser],
    x: jax.Array,
    steps: np.ndarray,
    tables: Any,
    keys: jax.Array | None = None,
    noise: jax.Array | None = None,
    trajectory_every: int | None = None,
    memory: Any = None,
) -> Images:
    """Runs `x, memory = step(denoise, x, memory, t, row of tables, draw)` over `steps`; `draw()` is a step's noise."""
    x = jnp.asarray(x, jnp.float32)
    if noise is not None:
        noise = jnp.asarray(noise, jnp.float32)
        if noise.shape != (len(steps), *x.shape):
            raise InputError(f"noise has shape {noise.shape}; expected {(len(steps), *x.shape)}, one draw a step.")
    elif keys is not None and len(keys) != len(x):
        raise InputError(f"there are {len(keys)} keys for {len(x)} images; expected one key an image.")
    states = None
    if trajectory_every is not None:
        if trajectory_every < 1:
            raise InputError(f"trajectory_every is {trajectory_every}; expected at least 1 step.")
        states = jnp.zeros((-(-len(steps) // trajectory_every), *x.shape), x.dtype)

    def body(denoise, carry, row):
        x, memory, states = carry
        i, t, table, given = row
        x, memory = step(denoise, x, memory, t, table, lambda: _draw(keys, i, x.shape[1:]) if given is None else given)
        if states is not None:
            # Each state overwrites the one before it until its k are over: no branch, and no more memory.
            states = states.at[i // trajectory_every].set(x)
        return (x, memory, states), None

    tables = jax.tree.map(lambda table: jnp.asarray(table, jnp.float32), tables)
    rows = (jnp.arange(len(steps)), jnp.asarray(steps, jnp.int32), tables, noise)
    carry = (x, memory, states)
    for denoiser, run in _runs(denoise, steps):
        carry, _ = jax.lax.scan(partial(body, denoiser), carry, jax.tree.map(lambda row, run=run: row[run], rows))
    x, _, states = carry
    return x if states is None else (x, states)


def _runs(denoise: Denoiser | Sequence[Denoiser], steps: np.ndarray) -> Iterator[tuple[Denoiser, slice]]:
    """Each denoiser with those of `steps`, in a row, that are its own."""
    start = 0
    for denoiser, run in groupby(steps, lambda t: denoise if callable(denoise) else denoise[t]):
        stop = start + len(list(run))
        yield denoiser, slice(start, stop)
        start = stop


def _draw(keys: jax.Array, i: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(keys)
