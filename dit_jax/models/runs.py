"""Which blocks of a network run together, by one scan: those of the same attention and number of heads."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import jax

from dit_jax.config import AttentionKind, DiTConfig, attention_layers
from dit_jax.models.attention import first_heads
from dit_jax.parallel.sharding import path_name


class Run(NamedTuple):
    """Consecutive blocks that one scan runs."""

    kinds: tuple[tuple[AttentionKind, bool], ...]
    """The attention of the blocks of one iteration, and whether its windows are shifted."""
    heads: int
    """Of each block."""
    first: int
    repeats: int
    whole: bool
    """Whether these are all the blocks of the network."""

    def part_of(self, stacked, num_heads: int):
        """The leaves of these blocks and their heads, with an axis for the blocks of one iteration if they are several.

        stacked: `DiTBlock`s of num_heads heads, and their modulations.
        """
        period = len(self.kinds)
        last = self.first + self.repeats * period
        part = stacked if self.whole else jax.tree.map(lambda leaf: leaf[self.first : last], stacked)
        if self.heads < num_heads:
            fewer = lambda path, leaf: first_heads(path_name(path), leaf, self.heads, num_heads)  # noqa: E731
            part = jax.tree_util.tree_map_with_path(fewer, part[0]), part[1]
        if period == 1:
            return part
        return jax.tree.map(lambda leaf: leaf.reshape(self.repeats, period, *leaf.shape[1:]), part)


def runs(config: DiTConfig) -> Iterator[Run]:
    """The blocks of a network by their attention and heads: windows come as pairs of one in place and one shifted."""
    kinds = []
    for kind, blocks in groupby(attention_layers(config.attention, config.depth)):
        shifts = kind.name in ("window", "mixed")
        kinds += [(kind, shifts and i % 2 == 1) for i, _ in enumerate(blocks)]
    first, kind_and_heads = 0, lambda block: (block[0][0], block[1])
    for (_, heads), blocks in groupby(zip(kinds, config.block_heads, strict=True), kind_and_heads):
        together = [kind for kind, _ in blocks]
        pair = tuple(dict.fromkeys(together))
        repeats, odd = divmod(len(together), len(pair))
        for some, times in ((pair, repeats), (pair[:1], odd)):
            if times:
                yield Run(some, heads, first, times, times * len(some) == config.depth)
                first += times * len(some)
