"""A small PyTorch twin of DiT, to hold the JAX network against.

Written from the paper (Peebles & Xie 2023, arXiv 2212.09748) and the published checkpoint layout. Its state dict has
the names, shapes and order of a released checkpoint. Labels are never dropped here: whoever trains it without
guidance labels replaces them by the null class (id `num_classes`) before the call.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiT(nn.Module):
    """Diffusion transformer on NCHW images or latents; its output is exactly 0 right after initialisation."""

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        self.grid, self.patch_size = input_size // patch_size, patch_size
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.pos_embed = nn.Parameter(grid_positions(hidden_size, self.grid)[None], requires_grad=False)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.final_layer.adaLN_modulation = modulation(hidden_size, chunks=2)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Xavier-uniform and zero biases; N(0, 0.02) for the embedders of t and y; zero for whatever opens a gate."""
        for name, weight in self.named_parameters():
            if name == "pos_embed":
                continue
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                weight.zero_()
            elif name.startswith(("t_embedder", "y_embedder")):
                weight.normal_(std=0.02)
            else:
                nn.init.xavier_uniform_(weight.flatten(1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x: (B, C, H, W), t: (B,) in original steps 0..999, y: (B,) class ids -> (B, C or 2C, H, W)."""
        tokens = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        c = self.t_embedder.mlp(timestep_features(t)) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = chunks_of(self.final_layer.adaLN_modulation(c), 2)
        return self.unpatchify(self.final_layer.linear(modulated_norm(tokens, shift, scale)))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, p*p*C) with the channel fastest -> (B, C, H, W)."""
        pixels = tokens.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (self.grid, self.grid))
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def twin(config) -> DiT:
    """The PyTorch network of a `DiTConfig`."""
    return DiT(**{name: getattr(config, name) for name in inspect.signature(DiT).parameters})


class Block(nn.Module):
    """Transformer block with adaLN-Zero (Peebles & Xie 2023, fig. 3)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.adaLN_modulation = modulation(width, chunks=6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks_of(self.adaLN_modulation(c), 6)
        x = x + gate_msa * self.attn(modulated_norm(x, shift_msa, scale_msa))
        h = F.gelu(self.mlp.fc1(modulated_norm(x, shift_mlp, scale_mlp)), approximate="tanh")
        return x + gate_mlp * self.mlp.fc2(h)


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are [q; k; v], each head-major."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulation(width: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


def chunks_of(vector: Tensor, n: int) -> tuple[Tensor, ...]:
    """(B, n*D) -> n tensors of (B, 1, D), which broadcast over tokens."""
    return vector[:, None].chunk(n, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def timestep_features(t: Tensor) -> Tensor:
    """t: (B,) -> (B, 256), cosines then sines of 128 frequencies from 1 down towards 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies.to(t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(width: int, grid: int) -> Tensor:
    """(grid*grid, width) float32, row-major: half of the channels tell the column, the other half the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=-1).float()
