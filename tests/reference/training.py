"""A small PyTorch twin of DiT's training and of the checkpoints that it leaves, to move runs to and from JAX.

Written from the recipe of the paper (Peebles & Xie 2023, section 4: AdamW without decay, EMA) and the published
checkpoint layout. Nothing random happens here: whoever trains draws t, noise and the dropped labels.
"""

import copy
from argparse import Namespace
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from reference.diffusion import Diffusion
from reference.dit import DiT


class Trainer:
    """A model, its average and its optimiser; the average starts as a copy."""

    def __init__(self, model: DiT, lr: float = 1e-4, ema_decay: float = 0.9999, diffusion_steps: int = 1000):
        self.model, self.ema = model, copy.deepcopy(model).requires_grad_(False)
        # The fixed pos_embed is the optimiser's parameter 0 and never has a state; a checkpoint counts it.
        self.opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
        self.ema_decay, self.diffusion = ema_decay, Diffusion(diffusion_steps)

    def step(self, x0: ArrayLike, y: ArrayLike, t: ArrayLike, noise: ArrayLike, dropped: ArrayLike) -> dict[str, float]:
        """One update; returns the batch's mean "loss", "mse" and "vb", and the "grad_norm" over all parameters.

        x0, noise: (B, C, H, W). y: (B,) class ids, the null class wherever dropped (B,) is true. t: (B,) steps.
        """
        x0, y, t, noise, dropped = map(torch.as_tensor, (x0, y, t, noise, dropped))
        null_class = self.model.y_embedder.embedding_table.num_embeddings - 1
        x_t = self.diffusion.q_sample(x0, t, noise)
        output = self.model(x_t, t, y.masked_fill(dropped, null_class))
        terms = {name: term.mean() for name, term in self.diffusion.losses(output, x0, x_t, t, noise).items()}
        self.opt.zero_grad()
        terms["loss"].backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.requires_grad])
        self.opt.step()
        self.average()
        return {name: value.item() for name, value in (terms | {"grad_norm": grad_norm}).items()}

    @torch.no_grad()
    def average(self):
        """ema = decay * ema + (1 - decay) * model, for every parameter."""
        for mean, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            mean.mul_(self.ema_decay).add_(parameter, alpha=1 - self.ema_decay)

    def save(self, path: Path | str, args: Namespace | None = None):
        """Writes {"model", "ema", "opt", "args"}, as the official training does; args: of the command line."""
        states = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "opt": self.opt.state_dict()}
        torch.save(states | {"args": args or training_args()}, path)

    def load(self, path: Path | str):
        """Continues from such a file, its learning rate included; its "args" may be absent and are not looked at."""
        with torch.serialization.safe_globals([Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.opt.load_state_dict(checkpoint["opt"])


def training_args(**changes: str | int) -> Namespace:
    """The command line that a training checkpoint remembers, as of a released run where nothing else is said."""
    released = {
        "data_path": "imagenet/train",
        "results_dir": "results",
        "model": "DiT-XL/2",
        "image_size": 256,
        "num_classes": 1000,
        "epochs": 1400,
        "global_batch_size": 256,
        "global_seed": 0,
        "vae": "ema",
        "num_workers": 4,
        "log_every": 100,
        "ckpt_every": 50_000,
    }
    return Namespace(**released | changes)
