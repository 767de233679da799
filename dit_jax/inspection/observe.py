"""A forward pass that is watched: statistics of every head, and what the condition lets through of every block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import DiTConfig
from dit_jax.inspection.explicit import Inputs, attention_weights, explicit_forward, join_heads, weighted
from dit_jax.inspection.statistics import HeadStatistics, finished, summed
from dit_jax.models.dit import Conditions, DiT, DiTBlock
from dit_jax.models.kernels import split_heads
from dit_jax.models.layers import plain_norm

CHUNK = 256  # queries whose weights exist at once
WEIGHTS_AT_ONCE = 2**23  # of them and of the images together: 32 MiB


class Branch(NamedTuple):
    """What a branch of a block adds, by image: (depth, B) float32."""

    survives: jax.Array
    """Norm after the adaLN gate over norm before it."""
    share: jax.Array
    """Norm after the gate over that of the tokens it is added to."""


class Observation(NamedTuple):
    """What was seen in one pass over B images."""

    out: jax.Array
    """The network's output, (B, H, W, C_out)."""
    heads: HeadStatistics
    """Leaves (depth, B, heads)."""
    attention: Branch
    mlp: Branch
    widest_gate: jax.Array | None
    """(depth, B, heads): the largest gate of a head over the tokens; None for heads without gates."""
    weights: jax.Array | None
    """(depth, B, heads, len(queries), N) attention weights of the queries that were asked for."""


def observe(
    model: DiT,
    inputs: Inputs,
    *,
    segments: jax.Array | None = None,
    queries: jax.Array | None = None,
    chunk: int = CHUNK,
) -> Observation:
    """One pass with attention written out; its output is that of `model(*inputs)`.

    Weights live for `chunk` queries of one block at a time (fewer, if it does not divide the tokens) and are reduced
    to statistics at once; those of `queries` (n,) alone are kept.

    segments: (B, patches) int32, what each patch belongs to.
    """
    side = model.config.side

    def visit(block: DiTBlock, x: jax.Array, modulation: tuple, conditions: Conditions, seen: jax.Array, _: None):
        statistics = rows = None

        def attend(qkv: jax.Array, head_dim: int) -> jax.Array:
            nonlocal statistics, rows
            q, k, v = (part.swapaxes(1, 2) for part in split_heads(qkv, head_dim))
            if queries is not None:
                rows = attention_weights(q[:, :, queries], k, seen[:, queries])
            heads, statistics = _attend_in_parts(q, k, v, seen, side, segments, chunk)
            return join_heads(heads)

        attention, gates = block.attention(x, modulation, conditions.c, attend)
        after, attention = _through_gate(x, attention, modulation[2])
        if block.cross_attn is not None:
            crossed = block.cross_attn(plain_norm(after), conditions.context, conditions.mask)
            after = (after + crossed).astype(x.dtype)
        after, mlp = _through_gate(after, block.feed_forward(after, modulation), modulation[5])
        return after, (statistics, attention, mlp, None if gates is None else gates.max(axis=1), rows)

    out, kept = explicit_forward(model, inputs, visit)
    return Observation(out, *kept)


def images_at_once(config: DiTConfig) -> int:
    """As many as keep the weights of one block's chunk of queries within WEIGHTS_AT_ONCE, at most 16."""
    weights = config.num_heads * config.tokens * min(config.tokens, CHUNK)
    return int(np.clip(WEIGHTS_AT_ONCE // weights, 1, 16))


def _attend_in_parts(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, side: int, segments: jax.Array | None, chunk: int
) -> tuple[jax.Array, HeadStatistics]:
    """The heads (B, H, N, d) and their statistics, a part of the queries after the other."""
    B, H, N, d = q.shape
    size = max(size for size in range(1, min(chunk, N) + 1) if N % size == 0)

    def part(rows: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = attention_weights(q[:, :, rows], k, seen[:, rows])
        return weighted(weights, v), summed(weights, rows, seen[:, rows], side, segments)

    heads, sums = jax.lax.map(part, jnp.arange(N).reshape(-1, size))
    heads = jnp.moveaxis(heads, 0, 2).reshape(B, H, N, d)
    return heads, finished({name: values.sum(axis=0) for name, values in sums.items()}, side)


def _through_gate(x: jax.Array, branch: jax.Array, gate: jax.Array) -> tuple[jax.Array, Branch]:
    """x: (B, N, D) -> x + gate * branch in its dtype, as DiTBlock has it, and what became of the branch."""
    passed = gate * branch
    norm = lambda a: jnp.sqrt(jnp.square(a.astype(jnp.float32)).sum(axis=(1, 2)))  # noqa: E731
    ratio = lambda a, b: a / jnp.maximum(b, 1e-30)  # noqa: E731
    survived = norm(passed)
    return (x + passed).astype(x.dtype), Branch(ratio(survived, norm(branch)), ratio(survived, norm(x)))
