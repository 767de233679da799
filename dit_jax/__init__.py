"""Diffusion Transformers in JAX and Flax NNX."""

from importlib import import_module

from dit_jax import evaluation as evaluation
from dit_jax.config import DiTConfig as DiTConfig
from dit_jax.diffusion.gaussian import GaussianDiffusion as GaussianDiffusion
from dit_jax.diffusion.guidance import guided as guided
from dit_jax.diffusion.samplers import ddim_invert as ddim_invert
from dit_jax.diffusion.samplers import ddim_sample as ddim_sample
from dit_jax.diffusion.samplers import ddpm_sample as ddpm_sample
from dit_jax.diffusion.samplers import dpm_solver_sample as dpm_solver_sample
from dit_jax.models.dit import DiT as DiT

__version__ = "0.1.0"

# Imported at first use: what they need takes longer to import than JAX and Flax.
_AT_FIRST_USE = {
    "AutoencoderConfig": "dit_jax.models.autoencoder",
    "AutoencoderKL": "dit_jax.models.autoencoder",
    "InceptionV3": "dit_jax.models.inception",
    "load_dit": "dit_jax.checkpoints.files",
    "save_dit": "dit_jax.checkpoints.files",
}


def __getattr__(name: str):
    if name in _AT_FIRST_USE:
        return getattr(import_module(_AT_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
