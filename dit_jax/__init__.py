"""Diffusion Transformers in JAX and Flax NNX."""

__version__ = "0.1.0"

from dit_jax.config import DiTConfig as DiTConfig
from dit_jax.diffusion.gaussian import GaussianDiffusion as GaussianDiffusion
from dit_jax.diffusion.guidance import guided as guided
from dit_jax.diffusion.samplers import ddim_invert as ddim_invert
from dit_jax.diffusion.samplers import ddim_sample as ddim_sample
from dit_jax.diffusion.samplers import ddpm_sample as ddpm_sample
from dit_jax.models.dit import DiT as DiT
