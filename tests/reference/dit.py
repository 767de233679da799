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
        block: str = "adaLN-Zero",
        context_features: int = 0,
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
        self.block, crossed = block, context_features > 0 or block == "cross-attention"
        if context_features:
            self.context_embedder = nn.Module()
            gelu = nn.GELU(approximate="tanh")
            layers = nn.Linear(context_features, hidden_size), gelu, nn.Linear(hidden_size, hidden_size)
            self.context_embedder.mlp = nn.Sequential(*layers)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, block, crossed) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        if block in CHUNKS:
            self.final_layer.adaLN_modulation = modulation(hidden_size, chunks=2)
        else:
            self.final_layer.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """Xavier-uniform and zero biases; N(0, 0.02) for the embedders of t and y; zero for whatever opens a gate."""
        for name, weight in self.named_parameters():
            if name == "pos_embed":
                continue
            zeros = ("bias", "adaLN_modulation.1.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
            if name.endswith(zeros):
                weight.zero_()
            elif name.startswith(("t_embedder", "y_embedder")):
                weight.normal_(std=0.02)
            elif weight.ndim > 1:  # a LayerNorm keeps its ones
                nn.init.xavier_uniform_(weight.flatten(1))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """x: (B, C, H, W), t: (B,) in original steps 0..999, y: (B,) class ids, context: (B, L, F), mask: (B, L), with
        a token in every row -> (B, C or 2C, H, W)."""
        tokens = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed
        patches, seen, there = tokens.shape[1], [], []
        t_and_y = torch.stack([self.t_embedder.mlp(timestep_features(t)), self.y_embedder.embedding_table(y)], dim=1)
        c = t_and_y.sum(dim=1)
        if context is not None:
            tokens_of_context = self.context_embedder.mlp(context)
            seen.append(tokens_of_context + axis_positions(tokens_of_context.shape[2], context.shape[1]).float())
            there.append(mask)
        if self.block == "cross-attention":
            seen.append(t_and_y)
            there.append(torch.ones(t_and_y.shape[:2], dtype=torch.bool))
        if self.block == "in-context":
            tokens = torch.cat([tokens, t_and_y], dim=1)
        looked_at = (torch.cat(seen, dim=1), torch.cat(there, dim=1)) if seen else None
        for block in self.blocks:
            tokens = block(tokens, c, looked_at)
        tokens = tokens[:, :patches]
        if self.block in CHUNKS:
            tokens = modulated_norm(tokens, *chunks_of(self.final_layer.adaLN_modulation(c), 2))
        else:
            tokens = self.final_layer.norm_final(tokens)
        return self.unpatchify(self.final_layer.linear(tokens))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, p*p*C) with the channel fastest -> (B, C, H, W)."""
        pixels = tokens.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (self.grid, self.grid))
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def twin(config) -> DiT:
    """The PyTorch network of a `DiTConfig`."""
    return DiT(**{name: getattr(config, name) for name in inspect.signature(DiT).parameters})


CHUNKS = {"adaLN-Zero": 6, "adaLN": 4}  # of the modulation; the other blocks have none


class Block(nn.Module):
    """Transformer block of one of the paper's designs (Peebles & Xie 2023, fig. 3); a context is looked at after
    self-attention, the tokens normalised without affine parameters."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, block: str, crossed: bool):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.block, self.cross_attn = block, CrossAttention(width, num_heads) if crossed else None
        if block in CHUNKS:
            self.adaLN_modulation = modulation(width, chunks=CHUNKS[block])
        else:
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, c: Tensor, looked_at: tuple[Tensor, Tensor] | None) -> Tensor:
        gate_msa = gate_mlp = 1.0
        if self.block == "adaLN-Zero":
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks_of(self.adaLN_modulation(c), 6)
        elif self.block == "adaLN":
            shift_msa, scale_msa, shift_mlp, scale_mlp = chunks_of(self.adaLN_modulation(c), 4)
        adaptive = self.block in CHUNKS
        x = x + gate_msa * self.attn(modulated_norm(x, shift_msa, scale_msa) if adaptive else self.norm1(x))
        if self.cross_attn is not None:
            x = x + self.cross_attn(F.layer_norm(x, x.shape[-1:], eps=1e-6), *looked_at)
        h = self.mlp.fc1(modulated_norm(x, shift_mlp, scale_mlp) if adaptive else self.norm2(x))
        return x + gate_mlp * self.mlp.fc2(F.gelu(h, approximate="tanh"))


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


class CrossAttention(nn.Module):
    """Multi-head attention from x to other tokens; the rows of `kv` are [k; v], each head-major."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(heads.transpose(1, 2).flatten(2))


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
    axis = axis_positions(width // 2, grid)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], dim=-1).float()


def axis_positions(width: int, length: int) -> Tensor:
    """(length, width) float64: sines, then cosines, of falling frequencies."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
