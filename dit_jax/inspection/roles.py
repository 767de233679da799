"""What a head does, by measure: its role follows from three statistics and the thresholds below, nothing else."""

import numpy as np

CUT = "cut"
"""What is said of a head that a block has lost and others have kept."""
SINK = 0.5
"""Of the mass: a head that gives half of it to the same few keys, whatever the query, says little of the query."""
UNIFORM = 0.95
"""Of the entropy there could be: as much as all but a quarter of 256 keys alike have. Such weights are an average."""
LOCAL = 0.6
"""Of the distance that uniform attention has. On 16 x 16 patches that is 5 patches: most of the image is farther."""
GLOBAL = 0.9
"""Of that distance: the place of the query hardly shows in where it looks."""

RULES = (
    ("sink", f"at least {SINK:.0%} of its mass on the same 1/32 of the keys, whatever the query"),
    ("local", f"not a sink, and its mean distance is at most {LOCAL:.0%} of that of uniform attention"),
    ("uniform", f"none of these, and its entropy is at least {UNIFORM:.0%} of the largest there can be"),
    ("global", f"none of these, and its mean distance is at least {GLOBAL:.0%} of that of uniform attention"),
    ("between", "none of these"),
)
"""What decides, in this order, in words."""
CUT_RULE = (CUT, "not there: pruned, where another block has kept more heads; all its numbers are 0")


def roles(distance: np.ndarray, relative_entropy: np.ndarray, sink: np.ndarray, uniform_distance: float) -> np.ndarray:
    """Statistics of heads, of any one shape -> their roles, an array of str of that shape.

    uniform_distance: the mean distance of attention to all patches alike (`of_uniform_attention`).
    """
    reach = np.asarray(distance) / max(uniform_distance, 1e-30)
    tests = {
        "sink": np.asarray(sink) >= SINK,
        "local": reach <= LOCAL,
        "uniform": np.asarray(relative_entropy) >= UNIFORM,
        "global": reach >= GLOBAL,
    }
    return np.select(list(tests.values()), list(tests), "between")
