import numpy as np
import pytest

from dit_jax.diffusion.schedules import betas, respaced_timesteps
from dit_jax.errors import InputError


def test_250_of_1000_are_the_published_timesteps():
    kept = respaced_timesteps("250", 1000)
    assert kept[:6].tolist() == [0, 4, 8, 12, 16, 20]
    assert kept[-4:].tolist() == [987, 991, 995, 999]


@pytest.mark.parametrize(
    "respacing, counts",
    [
        ("", [1000]),
        ("1000", [1000]),
        ("1", [1]),
        ("333,333,333", [333] * 3),
        ("10,15,20", [10, 15, 20]),
        ("7,1", [7, 1]),
    ],
)
def test_sections_keep_as_many_as_asked_with_both_ends(respacing, counts):
    kept = respaced_timesteps(respacing, 1000)
    edges = np.cumsum([0] + [len(part) for part in np.array_split(np.arange(1000), len(counts))])
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        section = kept[(kept >= start) & (kept < end)]
        assert len(section) == count
        assert section[0] == start
        assert count == 1 or section[-1] == end - 1
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize("count, stride", [(50, 20), (10, 100), (36, 28), (1000, 1), (2, 500)])
def test_ddim_respacing_takes_the_smallest_stride_that_gives_the_count(count, stride):
    np.testing.assert_array_equal(respaced_timesteps(f"ddim{count}", 1000), np.arange(0, 1000, stride))


@pytest.mark.parametrize(
    "respacing, message",
    [
        ("2000", "2000 out of 1000"),
        ("400,601", "601 out of 500"),
        ("0", "0 out of 1000"),
        ("ddim37", 'stride keeps 37 of 1000 steps; take "ddim36" or "ddim38"'),
        ("ddim0", 'take "ddim1" or "ddim2"'),
        ("ddim", "expected text such as"),
        ("fifty", "'fifty'; expected text such as"),
        ("10,,20", "expected text such as"),
        ("-5", "expected text such as"),
        (250, "respacing is 250; expected text"),
    ],
)
def test_an_impossible_respacing_is_told_in_one_line(respacing, message):
    with pytest.raises(InputError, match=message) as error:
        respaced_timesteps(respacing, 1000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_every_schedule_ends_in_noise_whatever_its_length(schedule, steps):
    result = betas(schedule, steps)
    assert result.shape == (steps,) and result.dtype == np.float64
    assert (result > 0).all() and (np.diff(result) >= 0).all()
    assert np.prod(1 - result) < 1e-4


def test_an_impossible_schedule_is_told():
    with pytest.raises(InputError, match="'cosine'; expected one of linear, squaredcos_cap_v2"):
        betas("cosine", 1000)
    with pytest.raises(InputError, match="20 steps reaches beta 1,"):
        betas("linear", 20)
    assert betas("linear", 21).max() < 1
    with pytest.raises(InputError, match="at least one step"):
        betas("linear", 0)
