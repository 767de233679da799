from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.seeded import seeded_array

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="session")
def golden():
    """`golden(name)`: one array of diffusion.npz, pictures turned channels-last."""
    arrays = np.load(GOLDENS / "diffusion.npz")

    def read(name):
        array = arrays[name]
        return np.moveaxis(array, -3, -1) if array.ndim == 4 else array

    read.names = arrays.files
    return read


@pytest.fixture(scope="session")
def draws():
    """`draws(stream, n)`: the noise of a golden loop in the order of use, (n, 3, 4, 4, 4)."""

    def read(stream, n):
        return np.stack([np.moveaxis(seeded_array(f"diffusion/{stream}/{i}", (3, 4, 4, 4)), 1, -1) for i in range(n)])

    return read


@pytest.fixture(scope="session")
def toy():
    """`toy(diffusion)`: the denoiser of the goldens, with as many channels as the process reads."""

    def for_process(diffusion):
        def denoise(x, t):
            t = t.astype(jnp.float32)[:, None, None, None]
            first = 0.9 * x + 0.1 * jnp.cos(t / 50)
            if diffusion.variance != "learned_range":
                return first
            return jnp.concatenate([first, jnp.tanh(0.5 * x + t / 1000 - 0.5)], axis=-1)

        return denoise

    return for_process


@pytest.fixture(scope="session")
def gaussian_data():
    """`gaussian_data(diffusion, mean, std)`: the best possible denoiser for data that is N(mean, std^2) everywhere."""

    def for_process(diffusion, mean, std):
        alphas_cumprod = np.ones(diffusion.steps, np.float32)
        alphas_cumprod[diffusion.timestep_map] = diffusion.alphas_cumprod

        def denoise(x, t):
            abar = jnp.asarray(alphas_cumprod)[t][:, None, None, None]
            return jnp.sqrt(1 - abar) * (x - jnp.sqrt(abar) * mean) / (abar * std**2 + 1 - abar)

        return denoise

    return for_process


@pytest.fixture
def keys():
    return jax.random.split(jax.random.key(7), 8)
