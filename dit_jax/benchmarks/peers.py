"""The same weights and inputs in diffusers' PyTorch classes, to be measured in turn with ours, where ours computes."""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.checkpoints.autoencoder_layout import save_autoencoder
from dit_jax.checkpoints.files import save_dit
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import AutoencoderKL
from dit_jax.models.dit import DiT

Run = Callable[[], Any]

SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm-solver++": "DPMSolverMultistepScheduler"}


def diffusers_dit(model: DiT, x: np.ndarray, t: np.ndarray, y: np.ndarray) -> Run:
    """A forward pass of `DiTTransformer2DModel`."""
    peer = diffusers_network(model)
    x, t, y = nchw(x), tensor(t), tensor(y)
    return run_of(lambda: peer(x, timestep=t, class_labels=y).sample, model.config.precision.operands)


def diffusers_sampler(model: DiT, process: Mapping[str, Any], settings: Mapping[str, Any], y: np.ndarray) -> Run:
    """What `DiTPipeline` does before it decodes, with diffusers' own scheduler: pictures of the labels y (B,).

    process: `config.diffusion`. settings: `config.sample`; guidance moves all channels of the noise there, and DDPM's
    variance is not the learned one.
    """
    network, scheduler = diffusers_network(model), SCHEDULERS[settings["sampler"]]
    import diffusers
    import torch

    scheduler = getattr(diffusers, scheduler)(
        num_train_timesteps=process["steps"],
        beta_schedule=process["schedule"],
        **({} if "Solver" in scheduler else {"clip_sample": settings["clip_denoised"]}),
    )
    shape, scale = (len(y), model.config.in_channels, *[model.config.input_size] * 2), settings["guidance"]
    y = tensor(np.concatenate([y, np.full_like(y, model.config.num_classes)]) if scale != 1 else y)

    def pictures() -> Any:
        x = torch.randn(shape, device=y.device)
        scheduler.set_timesteps(settings["steps"])
        for t in scheduler.timesteps:
            both = torch.cat([x, x]) if scale != 1 else x
            noise = network(both, timestep=t.expand(len(both)).to(y.device), class_labels=y).sample[:, : shape[1]]
            if scale != 1:
                conditional, unconditional = noise.chunk(2)
                noise = unconditional + scale * (conditional - unconditional)
            x = scheduler.step(noise, t, x).prev_sample
        return x

    return run_of(pictures, model.config.precision.operands)


def diffusers_network(model: DiT) -> Any:
    return loaded("DiTTransformer2DModel", lambda folder: save_dit(model, f"diffusers:{folder}"), "transformer")


def diffusers_autoencoder(vae: AutoencoderKL, x: np.ndarray, z: np.ndarray) -> dict[str, Run]:
    """Encoding and decoding by `AutoencoderKL`."""
    peer = loaded("AutoencoderKL", lambda folder: save_autoencoder(vae, f"diffusers:{folder}/vae"), "vae")
    x, z = nchw(x), nchw(z)
    return {
        "encode, diffusers": run_of(lambda: peer.encode(x).latent_dist.parameters),
        "decode, diffusers": run_of(lambda: peer.decode(z).sample),
    }


def loaded(name: str, save: Callable[[str], None], part: str) -> Any:
    """diffusers' class of that name, with the weights that `save` writes to a folder, in its sub-folder `part`."""
    try:
        import diffusers
        import torch  # noqa: F401  without it diffusers has placeholders only
    except ImportError as error:
        raise InputError("--peer=diffusers needs PyTorch and diffusers: pip install torch diffusers") from error
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return getattr(diffusers, name).from_pretrained(f"{folder}/{part}").to(device())


def device() -> str:
    """PyTorch's name of what JAX computes on. Raises InputError if PyTorch does not."""
    import torch

    platform = jax.default_backend()
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    if platform != "cpu":
        raise InputError(f"--peer=diffusers: PyTorch finds no {platform.upper()} here: set JAX_PLATFORMS=cpu")
    return "cpu"


def nchw(x: np.ndarray) -> Any:
    return tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x).to(device())


def run_of(function: Run, operands: jnp.dtype = jnp.float32) -> Run:
    """`function` without gradients, its products of bfloat16 if ours have such operands; over when the device is."""
    import torch

    def run() -> Any:
        with torch.no_grad(), torch.autocast(device(), torch.bfloat16, enabled=operands == jnp.bfloat16):
            result = function()
        if device() == "cuda":
            torch.cuda.synchronize()
        return result

    return run
