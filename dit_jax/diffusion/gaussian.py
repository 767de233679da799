"""The Gaussian diffusion process: what adds noise, how a network's output is read, and what it is trained on.

Images are channels-last, (B, H, W, C). `t` counts the steps of the process at hand, 0 the least noisy: (B,), or a
scalar for a whole batch. A denoiser `denoise(x, t)` gets the timesteps of the process it was trained on instead,
`timestep_map[t]`, as (B,) int32, and returns C channels, or 2C with a learned variance. Computation is in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import schedules
from dit_jax.diffusion.likelihood import discretized_gaussian_nll, gaussian_kl, image_mean
from dit_jax.errors import InputError

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

_CHOICES = {
    "prediction": ("epsilon", "x_start"),
    "variance": ("learned_range", "fixed_large", "fixed_small"),
    "loss": ("mse", "rescaled_mse", "kl", "rescaled_kl"),
}


class Posterior(NamedTuple):
    """The model's p(x_{t-1} | x_t), and the x_0 it was built around: four arrays (B, H, W, C)."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    x_start: jax.Array


@dataclass(frozen=True)
class GaussianDiffusion:
    """A diffusion process by its recipe; its tables, (num_steps,) in float64, follow from that.

    Hashable and equal by recipe, so it may be closed over in `jit` or be a static argument. The same process with
    fewer steps is `dataclasses.replace(diffusion, respacing="250")`.
    """

    respacing: str
    schedule: str
    steps: int
    prediction: str
    variance: str
    loss: str

    @classmethod
    def create(
        cls,
        respacing: str = "",
        schedule: str = "linear",
        steps: int = 1000,
        prediction: str = "epsilon",
        variance: str = "learned_range",
        loss: str = "mse",
    ) -> "GaussianDiffusion":
        """The process that DiT was trained on, or another.

        respacing: which of the `steps` to keep, see `schedules.respaced_timesteps`.
        schedule: "linear" or "squaredcos_cap_v2".
        prediction: what the first C channels of the output are, "epsilon" (the noise) or "x_start".
        variance: "learned_range" (C more channels), "fixed_large" (beta) or "fixed_small" (the true posterior's).
        loss: "mse", "rescaled_mse", "kl" or "rescaled_kl", see `losses`.
        Raises InputError for an unknown choice or a respacing that does not fit.
        """
        return cls(respacing, schedule, steps, prediction, variance, loss)

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise InputError(f"{field} is {getattr(self, field)!r}; expected one of {', '.join(choices)}.")
        _ = self.betas  # a schedule or respacing that does not fit is told here, not at first use

    @cached_property
    def timestep_map(self) -> np.ndarray:
        """The original timestep of each step."""
        return schedules.respaced_timesteps(self.respacing, self.steps)

    @cached_property
    def betas(self) -> np.ndarray:
        kept = np.cumprod(1.0 - schedules.betas(self.schedule, self.steps))[self.timestep_map]
        return 1.0 - kept / np.append(1.0, kept[:-1])

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> np.ndarray:
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Ho et al. 2020, eq. 7."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Entry 0, which would be log 0, is that of step 1."""
        return np.log(np.append(self._first_variance, self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of x_0 in the posterior mean (Ho et al. 2020, eq. 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of x_t in the posterior mean (Ho et al. 2020, eq. 7)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @property
    def num_steps(self) -> int:
        return len(self.timestep_map)

    def q_mean_variance(self, x0: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, variance and log variance of q(x_t | x_0), each like x0 (Ho et al. 2020, eq. 4)."""
        mean = _at(np.sqrt(self.alphas_cumprod), t) * x0
        variance = _at(1.0 - self.alphas_cumprod, t)
        log_variance = _at(np.log1p(-self.alphas_cumprod), t)
        return mean, jnp.broadcast_to(variance, x0.shape), jnp.broadcast_to(log_variance, x0.shape)

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t from x_0 and a standard normal draw of its shape (Ho et al. 2020, eq. 4)."""
        return _at(np.sqrt(self.alphas_cumprod), t) * x0 + _at(np.sqrt(1.0 - self.alphas_cumprod), t) * noise

    def q_posterior_mean_variance(
        self, x0: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), each like x_t (Ho et al. 2020, eq. 7)."""
        mean = _at(self.posterior_mean_coef1, t) * x0 + _at(self.posterior_mean_coef2, t) * x_t
        variance = _at(self.posterior_variance, t)
        log_variance = _at(self.posterior_log_variance_clipped, t)
        return mean, jnp.broadcast_to(variance, x_t.shape), jnp.broadcast_to(log_variance, x_t.shape)

    def x_start_from_epsilon(self, x_t: jax.Array, t: jax.Array, epsilon: jax.Array) -> jax.Array:
        """The x_0 that this noise implies, all like x_t."""
        abar = self.alphas_cumprod
        return _at(np.sqrt(1.0 / abar), t) * x_t - _at(np.sqrt(1.0 / abar - 1.0), t) * epsilon

    def epsilon_from_x_start(self, x_t: jax.Array, t: jax.Array, x_start: jax.Array) -> jax.Array:
        """The noise that this x_0 implies, all like x_t."""
        abar = self.alphas_cumprod
        return (_at(np.sqrt(1.0 / abar), t) * x_t - x_start) / _at(np.sqrt(1.0 / abar - 1.0), t)

    def predict_x_start(
        self,
        output: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        clip_denoised: bool = False,
        denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """The x_0 that a denoiser's output at x_t means, through `denoised_fn` and then clipped to [-1, 1] if asked.

        Raises InputError if the output's channels do not fit x_t and the variance.
        """
        x_start = self._prediction(output, x_t)
        if self.prediction == "epsilon":
            x_start = self.x_start_from_epsilon(x_t, t, x_start)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        return jnp.clip(x_start, -1.0, 1.0) if clip_denoised else x_start

    def p_mean_variance(
        self,
        output: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        clip_denoised: bool = False,
        denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Posterior:
        """p(x_{t-1} | x_t) from a denoiser's output at x_t; arguments as in `predict_x_start`.

        Mean: Ho et al. 2020, eq. 7 at the predicted x_0. Learned variance: Nichol & Dhariwal 2021, eq. 15.
        """
        x_start = self.predict_x_start(output, x_t, t, clip_denoised, denoised_fn)
        mean, _, posterior_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        if self.variance == "learned_range":
            fraction = (output[..., x_t.shape[-1] :].astype(jnp.float32) + 1.0) / 2.0
            log_variance = fraction * _at(np.log(self.betas), t) + (1.0 - fraction) * posterior_log_variance
            return Posterior(mean, jnp.exp(log_variance), log_variance, x_start)
        if self.variance == "fixed_large":
            large = np.append(self._first_variance, self.betas[1:])
            variance, log_variance = _at(large, t), _at(np.log(large), t)
        else:
            variance, log_variance = _at(self.posterior_variance, t), posterior_log_variance
        return Posterior(mean, *(jnp.broadcast_to(v, x_t.shape) for v in (variance, log_variance)), x_start)

    def losses(self, denoise: Denoiser, x0: jax.Array, t: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """The training loss of each image and its parts: {"loss", "mse", "vb"}, each (B,).

        "mse" and "rescaled_mse": loss = mse + vb (Nichol & Dhariwal 2021, eq. 16). vb trains the learned variance
            alone, the mean it sees is constant; it is 0 with a fixed variance. "rescaled_mse" has it times
            num_steps / 1000.
        "kl": loss = vb, with gradients to mean and variance; "rescaled_kl": loss = num_steps * vb, an estimate of
            the whole bound when t is uniform.

        mse is the mean squared error of the predicted noise (or x_0), whatever the loss.
        vb is one term of the variational bound in bits per dimension (Ho et al. 2020, eq. 5).
        Raises InputError if the denoiser returns the wrong number of channels.
        """
        x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
        x_t = self.q_sample(x0, t, noise)
        output = denoise(x_t, self.original_timesteps(t, len(x0)))
        target = noise if self.prediction == "epsilon" else x0
        mse = image_mean((target - self._prediction(output, x_t)) ** 2)

        posterior = self.p_mean_variance(output, x_t, t)
        if self.loss in ("kl", "rescaled_kl"):
            vb = self._bound_term(posterior, x0, x_t, t)
            return {"loss": vb * self.num_steps if self.loss == "rescaled_kl" else vb, "mse": mse, "vb": vb}
        if self.variance != "learned_range":
            return {"loss": mse, "mse": mse, "vb": jnp.zeros_like(mse)}
        vb = self._bound_term(posterior._replace(mean=jax.lax.stop_gradient(posterior.mean)), x0, x_t, t)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_steps / 1000.0)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def bits_per_dim(
        self, denoise: Denoiser, x0: jax.Array, noise: jax.Array, clip_denoised: bool = True
    ) -> dict[str, jax.Array]:
        """The variational bound on -log2 p(x_0), per dimension, of each image (Ho et al. 2020, eq. 5).

        x0: (B, H, W, C) in [-1, 1]. noise: (num_steps, B, H, W, C), in the order of use: the last step first.
        Returns "total_bpd" (B,) = "prior_bpd" (B,) + the sum of "vb"; "vb", "x_start_mse" and "mse" (of the noise),
        each (B, num_steps), again with the last step first.
        """
        x0, noise = jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)
        if noise.shape != (self.num_steps, *x0.shape):
            raise InputError(
                f"noise has shape {noise.shape}; expected {(self.num_steps, *x0.shape)}, one draw for each step."
            )

        def terms(_, step):
            t, noise = step
            x_t = self.q_sample(x0, t, noise)
            output = denoise(x_t, self.original_timesteps(t, len(x0)))
            posterior = self.p_mean_variance(output, x_t, t, clip_denoised)
            epsilon = self.epsilon_from_x_start(x_t, t, posterior.x_start)
            return None, {
                "vb": self._bound_term(posterior, x0, x_t, t),
                "x_start_mse": image_mean((posterior.x_start - x0) ** 2),
                "mse": image_mean((epsilon - noise) ** 2),
            }

        _, columns = jax.lax.scan(terms, None, (np.arange(self.num_steps, dtype=np.int32)[::-1], noise))
        columns = {name: column.T for name, column in columns.items()}
        mean, _, log_variance = self.q_mean_variance(x0, self.num_steps - 1)
        prior = image_mean(gaussian_kl(mean, log_variance, 0.0, 0.0)) / np.log(2.0)
        return {"total_bpd": columns["vb"].sum(axis=1) + prior, "prior_bpd": prior, **columns}

    def original_timesteps(self, t: jax.Array, batch: int) -> jax.Array:
        """What a denoiser is told for step t: (batch,) int32."""
        return jnp.broadcast_to(jnp.asarray(self.timestep_map, jnp.int32)[t], (batch,))

    @cached_property
    def _first_variance(self) -> float:
        """In place of the posterior variance of step 0, which is zero."""
        return self.posterior_variance[1] if self.num_steps > 1 else self.betas[0]

    def _prediction(self, output: jax.Array, x_t: jax.Array) -> jax.Array:
        channels = x_t.shape[-1]
        expected = 2 * channels if self.variance == "learned_range" else channels
        if output.shape != (*x_t.shape[:-1], expected):
            raise InputError(
                f"the denoiser returned shape {output.shape} for x of shape {x_t.shape}; variance={self.variance!r} "
                f"expects {expected} channels: match variance and the model's learn_sigma."
            )
        return output[..., :channels].astype(jnp.float32)

    def _bound_term(self, posterior: Posterior, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """L_{t-1}, and L_0 at t = 0, in bits per dimension (Ho et al. 2020, eq. 5): (B,)."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x0, x_t, t)
        kl = gaussian_kl(true_mean, true_log_variance, posterior.mean, posterior.log_variance)
        nll = discretized_gaussian_nll(x0, posterior.mean, posterior.log_variance)
        return jnp.where(jnp.asarray(t) == 0, image_mean(nll), image_mean(kl)) / np.log(2.0)


def _at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """float32 entries of a table, shaped to scale images: t () -> (), t (B,) -> (B, 1, 1, 1)."""
    t = jnp.asarray(t)
    # Filled with NaN outside: a t drawn for a longer process must not train the last step in silence.
    entries = jnp.asarray(table, jnp.float32).at[t].get(mode="fill", wrap_negative_indices=False)
    return entries.reshape(t.shape + (1, 1, 1) * t.ndim)
