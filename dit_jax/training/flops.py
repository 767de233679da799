"""Analytic cost of DiT."""

from dit_jax.config import DiTConfig


def forward_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of one forward pass of one image: every matrix product, nothing else.

    The paper's "Gflops" are these, in units of 1e9.
    """
    N, D = config.tokens, config.hidden_size
    mlp = config.mlp_width
    tokens = 3 * D * D + D * D + 2 * D * mlp  # qkv, proj, fc1 and fc2, for each token
    attention = 2 * N * N * D  # scores and their product with the values
    block = N * tokens + attention + 6 * D * D  # and adaLN, once for each image
    patch_embed = N * config.patch_size**2 * config.in_channels * D
    timestep_mlp = 256 * D + D * D
    final_layer = 2 * D * D + N * D * config.patch_size**2 * config.out_channels
    return patch_embed + timestep_mlp + config.depth * block + final_layer


def train_flops(config: DiTConfig) -> int:
    """FLOPs of training on one image: two a multiply-accumulate, forward once and backward twice, no recomputation."""
    return 3 * 2 * forward_macs(config)
