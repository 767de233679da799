"""What the attention weights of a head come to: a few numbers an image, summed over queries a part at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy

from dit_jax.inspection.explicit import by_head

RADII = (1, 2, 4)  # patches
FEW = 32  # a sink is made of at most one key in so many


class HeadStatistics(NamedTuple):
    """Means over the patches as queries, for each image and head, (B, H) float32.

    Distances and shares are those of the weights that fall on patches, taken to sum to one; entropy and sink count the
    tokens of an in-context condition as keys too. Those tokens have no place, and are no queries here.
    """

    distance: jax.Array
    """Patches, Euclidean, from a query to its keys."""
    entropy: jax.Array
    """Nats."""
    relative_entropy: jax.Array
    """Entropy over that of the same weight for every key the query sees; 1 where it sees one."""
    within_1: jax.Array
    """Share of the mass at most so many patches away."""
    within_2: jax.Array
    within_4: jax.Array
    sink: jax.Array
    """Share of the mass on the N / FEW keys (rounded up) that get most of it from all queries together."""
    on_condition: jax.Array
    """Share of the mass on the tokens of an in-context condition."""
    same_segment: jax.Array | None
    """Share of the mass on patches of the query's own segment; None where segments are not known."""
    same_segment_chance: jax.Array | None
    """The same, had every key that the query sees the same weight."""


def summed(
    weights: jax.Array, rows: jax.Array, seen: jax.Array, side: int, segments: jax.Array | None
) -> dict[str, jax.Array]:
    """Sums over some queries, which `finished` turns into statistics once those of all queries are added.

    weights: (B, H, n, N) of the queries rows (n,); seen: (2, n, N); side: patches in a row; segments: (B, side^2).
    """
    patches, heads = side**2, weights.shape[1]
    is_patch = (rows < patches).astype(jnp.float32)
    place = lambda token: jnp.stack([token // side, token % side], axis=-1).astype(jnp.float32)  # noqa: E731
    distance = jnp.linalg.norm(place(rows)[:, None] - place(jnp.arange(patches)), axis=-1)
    on_patches = weights[..., :patches]
    mass = on_patches.sum(axis=-1)
    share = lambda chosen: jnp.einsum("bhnm,nm->bhn", on_patches, chosen) / jnp.maximum(mass, 1e-30)  # noqa: E731
    total = lambda values: (values * is_patch).sum(axis=-1)  # noqa: E731
    entropy = -xlogy(weights, weights).sum(axis=-1)
    most = jnp.log(by_head(seen, heads).sum(axis=-1).astype(jnp.float32))
    sums = {
        "distance": total(share(distance)),
        "entropy": total(entropy),
        "relative_entropy": total(jnp.where(most > 0, entropy / jnp.where(most > 0, most, 1.0), 1.0)),
        "on_condition": total(1.0 - mass),
        "columns": jnp.einsum("bhnm,n->bhm", weights, is_patch),
    }
    sums |= {f"within_{radius}": total(share((distance <= radius).astype(jnp.float32))) for radius in RADII}
    if segments is not None:
        own = jnp.take(segments, jnp.minimum(rows, patches - 1), axis=1)
        same = (own[..., None] == segments[:, None, :]).astype(jnp.float32)
        agreeing = jnp.einsum("bhnm,bnm->bhn", on_patches, same) / jnp.maximum(mass, 1e-30)
        seen_patches = seen[..., :patches].astype(jnp.float32)
        chance = jnp.einsum("pnm,bnm->pbn", seen_patches, same) / jnp.maximum(seen_patches.sum(-1), 1)[:, None]
        sums |= {"same_segment": total(agreeing), "same_segment_chance": total(by_head(chance, heads)).T}
    return sums


def finished(sums: dict[str, jax.Array], side: int) -> HeadStatistics:
    """The means, of the sums over all queries."""
    means = {name: values / side**2 for name, values in sums.items()}
    columns = means.pop("columns")
    few = -(-columns.shape[-1] // FEW)
    means["sink"] = jax.lax.top_k(columns, few)[0].sum(axis=-1)
    return HeadStatistics(**({"same_segment": None, "same_segment_chance": None} | means))


def of_uniform_attention(side: int) -> dict[str, float]:
    """The statistics of a head that gives every patch of a square image the same weight, but for its segments."""
    place = np.stack(np.divmod(np.arange(side**2), side), axis=-1)
    distance = np.linalg.norm(place[:, None] - place, axis=-1)
    within = {f"within_{radius}": float((distance <= radius).mean()) for radius in RADII}
    sink = -(-(side**2) // FEW) / side**2
    return {
        "distance": float(distance.mean()),
        "entropy": float(np.log(side**2)),
        "relative_entropy": 1.0,
        "sink": sink,
    } | within
