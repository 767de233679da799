"""A small PyTorch twin of the process that DiT is trained on, to hold the JAX one against.

Written from the papers (Ho et al. 2020, Nichol & Dhariwal 2021): linear schedule, predicted noise, learned variance.
Images are NCHW float32; `t` is (B,), step 0 the least noisy. Tables are float64, their entries are used as float32.
"""

import math

import numpy as np
import torch
from torch import Tensor


class Diffusion:
    """The process of `steps` steps; with 1000 of them, the released one."""

    def __init__(self, steps: int = 1000):
        self.betas = np.linspace(1e-4, 0.02, steps) * (1000 / steps)
        self.abar = np.cumprod(1.0 - self.betas)
        self.abar_prev = np.append(1.0, self.abar[:-1])
        variance = self.betas * (1.0 - self.abar_prev) / (1.0 - self.abar)
        self.posterior_log_variance = np.log(np.append(variance[1], variance[1:]))  # entry 0 would be log 0

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_0 and a standard normal draw of its shape (Ho et al. 2020, eq. 4)."""
        return entry(np.sqrt(self.abar), t) * x0 + entry(np.sqrt(1.0 - self.abar), t) * noise

    def losses(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """{"loss", "mse", "vb"}, each (B,), where loss = mse + vb (Nichol & Dhariwal 2021, eq. 16).

        output: (B, 2C, H, W), what the network makes of x_t: the noise, then the variance. The rest: (B, C, H, W).
        vb is a term of the variational bound in bits per dimension, and trains the variance alone.
        """
        epsilon, v = output.chunk(2, dim=1)
        mse = image_mean((noise - epsilon) ** 2)

        fraction = (v + 1.0) / 2.0  # Nichol & Dhariwal 2021, eq. 15
        posterior_log_variance = entry(self.posterior_log_variance, t)
        log_variance = fraction * entry(np.log(self.betas), t) + (1.0 - fraction) * posterior_log_variance
        mean = self.posterior_mean(self.x_start(x_t, t, epsilon.detach()), x_t, t)

        kl = gaussian_kl(self.posterior_mean(x0, x_t, t), posterior_log_variance, mean, log_variance)
        nll = discretized_gaussian_nll(x0, mean, log_variance)
        vb = torch.where(t == 0, image_mean(nll), image_mean(kl)) / math.log(2.0)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def x_start(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """The x_0 that this noise implies."""
        return entry(np.sqrt(1.0 / self.abar), t) * x_t - entry(np.sqrt(1.0 / self.abar - 1.0), t) * epsilon

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
        of_x0 = self.betas * np.sqrt(self.abar_prev) / (1.0 - self.abar)
        of_x_t = (1.0 - self.abar_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.abar)
        return entry(of_x0, t) * x0 + entry(of_x_t, t) * x_t


def entry(table: np.ndarray, t: Tensor) -> Tensor:
    """float32 entries of a table, shaped to scale images: t (B,) -> (B, 1, 1, 1)."""
    return torch.from_numpy(table)[t].float()[:, None, None, None]


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) of each element, in nats."""
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass that a Gaussian puts on the 8-bit level of each element of x (Ho et al. 2020, eq. 13)."""
    upper, lower = (normal_cdf((x - mean + edge) * torch.exp(-0.5 * log_variance)) for edge in (1 / 255, -1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return -torch.log(mass.clamp(min=1e-12))


def normal_cdf(x: Tensor) -> Tensor:
    """The tanh form, on which published bounds rest."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def image_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)."""
    return x.mean(dim=(1, 2, 3))
