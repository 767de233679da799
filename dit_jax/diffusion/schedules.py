"""Noise schedules, and which of their steps a shorter process keeps. Float64 numpy throughout."""

import re
from itertools import accumulate, repeat

import numpy as np

from dit_jax.errors import InputError


def betas(schedule: str, steps: int) -> np.ndarray:
    """Variance of the noise that each of `steps` steps adds: (steps,), each in (0, 1).

    `linear` is Ho et al. 2020, section 4, scaled to `steps`; `squaredcos_cap_v2` is
    Nichol & Dhariwal 2021, eq. 17, with betas of at most 0.999.
    Raises InputError for an unknown schedule, or one that `steps` steps cannot hold.
    """
    if schedule not in _SCHEDULES:
        raise InputError(f"schedule is {schedule!r}; expected one of {', '.join(_SCHEDULES)}.")
    if steps < 1:
        raise InputError(f"steps is {steps}; a process needs at least one step.")
    result = _SCHEDULES[schedule](steps)
    if result.max() >= 1.0:
        raise InputError(
            f"a {schedule} schedule of {steps} steps reaches beta {result.max():.4g}, which must stay below 1; "
            "take at least 21 steps, or squaredcos_cap_v2."
        )
    return result


def respaced_timesteps(respacing: str, steps: int) -> np.ndarray:
    """The sorted timesteps, out of 0..steps-1, that a respaced process keeps (Nichol & Dhariwal 2021, section 4).

    respacing: `""` all; `"N"` N of them, evenly, both ends included; `"a,b,c"` so many of each of three equal
        sections; `"ddimN"` every k-th from 0 on, k being the smallest stride that gives exactly N
        (Song et al. 2021, appendix D.2).
    Raises InputError for text of another form, or more steps than there are.
    """
    if respacing == "":
        return np.arange(steps)
    if not isinstance(respacing, str) or not re.fullmatch(r"ddim\d+|\d+(,\d+)*", respacing):
        raise InputError(f'respacing is {respacing!r}; expected text such as "", "250", "10,15,20" or "ddim50".')
    if respacing.startswith("ddim"):
        return _strided(int(respacing.removeprefix("ddim")), steps)
    counts = [int(count) for count in respacing.split(",")]
    # The first sections take the remainder of the division.
    edges = [(steps // len(counts)) * i + min(i, steps % len(counts)) for i in range(len(counts) + 1)]
    sections = zip(edges[:-1], edges[1:], counts, strict=True)
    return np.concatenate([start + _spread(count, end - start, respacing) for start, end, count in sections])


def _linear(steps: int) -> np.ndarray:
    return np.linspace(1e-4, 0.02, steps, dtype=np.float64) * (1000 / steps)


def _squared_cosine(steps: int) -> np.ndarray:
    alphas_cumprod = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


_SCHEDULES = {"linear": _linear, "squaredcos_cap_v2": _squared_cosine}


def _spread(count: int, size: int, respacing: str) -> np.ndarray:
    """`count` of 0..size-1 with both ends, at equal distances before rounding."""
    if not 1 <= count <= size:
        raise InputError(f'respacing "{respacing}" asks for {count} out of {size} steps; ask for 1 to {size} there.')
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    # Added up, not multiplied: published step lists depend on how the sums round.
    positions = accumulate(repeat(stride, count - 1), initial=0.0)
    return np.array([round(position) for position in positions])


def _strided(count: int, steps: int) -> np.ndarray:
    # Descending, so that of the strides which give the same count the smallest stays.
    strides = {len(range(0, steps, stride)): stride for stride in range(steps, 0, -1)}
    if count not in strides:
        near = " or ".join(f'"ddim{n}"' for n in sorted(sorted(strides, key=lambda n: abs(n - count))[:2]))
        raise InputError(f'respacing "ddim{count}": no integer stride keeps {count} of {steps} steps; take {near}.')
    return np.arange(0, steps, strides[count])
