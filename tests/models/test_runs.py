"""Which blocks one scan runs."""

import dataclasses

from dit_jax import DiTConfig
from dit_jax.config import AttentionKind
from dit_jax.models.runs import runs

FIVE = DiTConfig(input_size=9, patch_size=1, hidden_size=32, depth=5, num_heads=4)
WINDOW, EVERYWHERE = AttentionKind("window", 3), AttentionKind("global")


def runs_with(**changes) -> list[tuple]:
    return [(run.kinds, run.heads, run.first, run.repeats) for run in runs(dataclasses.replace(FIVE, **changes))]


def test_blocks_of_one_kind_run_as_one_scan_and_every_other_window_is_shifted():
    assert runs_with(attention="window:3*3,global*2") == [
        (((WINDOW, False), (WINDOW, True)), 4, 0, 1),
        (((WINDOW, False),), 4, 2, 1),
        (((EVERYWHERE, False),), 4, 3, 2),
    ]
    (whole,) = runs(FIVE)
    assert whole.whole and whole.repeats == 5


def test_blocks_of_as_many_heads_run_together_and_their_windows_keep_their_shifts():
    assert runs_with(attention="window:3", heads_left=(2, 4, 4, 4, 1)) == [
        (((WINDOW, False),), 2, 0, 1),
        (((WINDOW, True), (WINDOW, False)), 4, 1, 1),
        (((WINDOW, True),), 4, 3, 1),
        (((WINDOW, False),), 1, 4, 1),
    ]
