"""The network with attention written out: its weights exist, to be looked at or changed, and its output is the same."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import DiTConfig
from dit_jax.models.dit import DiT
from dit_jax.models.local_attention import allowed
from dit_jax.models.products import matmul, times_transpose
from dit_jax.models.runs import runs


class Inputs(NamedTuple):
    """The arguments of `DiT.__call__`."""

    x: jax.Array
    t: jax.Array
    y: jax.Array
    context: jax.Array | None = None
    context_mask: jax.Array | None = None


Visit = Callable[..., tuple[jax.Array, Any]]
"""(block, tokens (B, N, D), its modulation, conditions, seen (2, N, N), what is its own of `per_layer`) ->
the tokens after the block, and anything to keep of it."""


def explicit_forward(model: DiT, inputs: Inputs, visit: Visit, per_layer: Any = None) -> tuple[jax.Array, Any]:
    """`model(*inputs)` with `visit` in place of each block: the output, and what was kept, stacked on the depth axis.

    seen: which keys (axis 2) a query (axis 1) sees, for even heads and for odd ones. per_layer: leaves (depth, ...).
    One scan over all blocks, so that only the tokens and what is kept live from one to the next.
    """
    tokens, conditions = model.embed(*inputs)
    masks, which = seen_keys(model.config, tokens.shape[1])
    stacked = model.blocks_in(tokens.dtype), model.modulations(conditions.c), which, per_layer

    def layer(tokens: jax.Array, stacked: tuple) -> tuple[jax.Array, Any]:
        block, modulation, chosen, own = stacked
        return visit(block, tokens, modulation, conditions, jnp.asarray(masks)[chosen], own)

    tokens, kept = jax.lax.scan(layer, tokens, stacked)
    return model.read_out(tokens, conditions.c), kept


def seen_keys(config: DiTConfig, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The masks that blocks have, (K, N, N) bool, and which of them even and odd heads of each have, (depth, 2)."""
    masks, which = {}, []
    for run in runs(config):
        for kind, shifted in run.kinds * run.repeats:
            even = ("local", kind, shifted) if kind.name != "global" else ("all",)
            odd = ("all",) if kind.name == "mixed" else even
            for key in (even, odd):
                if key not in masks:
                    everything = np.ones((tokens, tokens), bool)
                    masks[key] = everything if key == ("all",) else allowed(kind, config.side, shifted)
            which.append([list(masks).index(key) for key in (even, odd)])
    return np.stack(list(masks.values())), np.array(which)


def attention_weights(q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
    """q: (B, H, n, d), k: (B, H, N, d), seen: (2, n, N) by the parity of the head -> (B, H, n, N) float32."""
    scores = times_transpose(q * q.shape[-1] ** -0.5, k)
    return jax.nn.softmax(jnp.where(by_head(seen, q.shape[1]), scores, -1e30))


def weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights: (B, H, n, N), v: (B, H, N, d) -> (B, H, n, d) in the dtype of v."""
    return matmul(weights.astype(v.dtype), v).astype(v.dtype)


def join_heads(heads: jax.Array) -> jax.Array:
    """(B, H, N, d) -> (B, N, H d)."""
    B, _, N, _ = heads.shape
    return heads.swapaxes(1, 2).reshape(B, N, -1)


def by_head(pair: jax.Array, heads: int) -> jax.Array:
    """(2, ...) for even heads and for odd ones -> (heads, ...)."""
    return pair[np.arange(heads) % 2]
