"""The same weights and inputs in diffusers' PyTorch classes, to be measured in turn with ours."""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from dit_jax.checkpoints.autoencoder_layout import save_autoencoder
from dit_jax.checkpoints.files import save_dit
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import AutoencoderKL
from dit_jax.models.dit import DiT

INSTALL = "--peer=diffusers needs PyTorch and diffusers: pip install torch diffusers"


def diffusers_dit(model: DiT, x: np.ndarray, t: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    """A forward pass of `DiTTransformer2DModel`."""
    try:
        import torch
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise InputError(INSTALL) from error

    with tempfile.TemporaryDirectory() as folder:
        save_dit(model, f"diffusers:{folder}")
        peer = DiTTransformer2DModel.from_pretrained(f"{folder}/transformer")
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    t, y = torch.from_numpy(t), torch.from_numpy(y)
    return without_gradients(lambda: peer(images, timestep=t, class_labels=y).sample)


def diffusers_autoencoder(vae: AutoencoderKL, x: np.ndarray, z: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Encoding and decoding by `AutoencoderKL`."""
    try:
        import torch
        from diffusers import AutoencoderKL as Peer
    except ImportError as error:
        raise InputError(INSTALL) from error

    with tempfile.TemporaryDirectory() as folder:
        save_autoencoder(vae, f"diffusers:{folder}/vae")
        peer = Peer.from_pretrained(f"{folder}/vae")
    images, latents = (torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2))) for a in (x, z))
    return {
        "encode, diffusers": without_gradients(lambda: peer.encode(images).latent_dist.parameters),
        "decode, diffusers": without_gradients(lambda: peer.decode(latents).sample),
    }


def without_gradients(function: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    return torch.no_grad()(function)
