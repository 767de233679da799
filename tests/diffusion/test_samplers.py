import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.samplers import ddim_invert, ddim_sample, ddpm_sample, dpm_solver_sample, initial_noise
from dit_jax.errors import InputError

SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample, "ddim_eta": partial(ddim_sample, eta=0.7)}
each_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("respacing", ["10", "25", "ddim10"])
def test_loops_replay_the_published_ones(golden, toy, draws, respacing, clip):
    diffusion = GaussianDiffusion.create(respacing)
    sample = {"clip_denoised": bool(clip)}
    n = diffusion.num_steps
    x = ddpm_sample(diffusion, toy(diffusion), golden("sample/xT"), None, noise=draws("ddpm", n), **sample)
    np.testing.assert_allclose(x, golden(f"sample/ddpm/{respacing}/clip{clip}"), atol=1e-4)
    for eta in (0.0, 0.7):
        x = ddim_sample(diffusion, toy(diffusion), golden("sample/xT"), None, eta, noise=draws("ddim", n), **sample)
        np.testing.assert_allclose(x, golden(f"sample/ddim/{respacing}/clip{clip}/eta{eta}"), atol=1e-4)


@pytest.mark.parametrize(
    "case, process", [("ddpm_fixed_large", {"variance": "fixed_large"}), ("ddpm_xstart", {"prediction": "x_start"})]
)
def test_other_readings_of_the_output_replay_the_published_loops(golden, toy, draws, case, process):
    diffusion = GaussianDiffusion.create("10", **process)
    x = ddpm_sample(diffusion, toy(diffusion), golden("sample/xT"), None, noise=draws("ddpm", 10))
    np.testing.assert_allclose(x, golden(f"sample/{case}/10"), atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_gradient_conditioning_replays_the_published_loops(golden, toy, draws, name):
    diffusion = GaussianDiffusion.create("10")
    run = partial(SAMPLERS[name], diffusion, toy(diffusion), golden("sample/xT"), None, noise=draws(name, 10))
    np.testing.assert_allclose(run(cond_fn=lambda x, t: -0.3 * x), golden(f"sample/{name}_cond_fn/10"), atol=1e-4)


def test_inversion_replays_the_published_loop(golden, toy):
    diffusion = GaussianDiffusion.create("10")
    for num_steps in (None, 9):
        x = ddim_invert(diffusion, toy(diffusion), golden("loss/x0"), num_steps=num_steps)
        np.testing.assert_allclose(x, golden("sample/ddim_reverse/10"), atol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_dpm_solver_walks_like_the_one_of_diffusers(toy, draws, schedule, steps):
    diffusion = GaussianDiffusion.create(str(steps), schedule, variance="fixed_small")
    theirs = DPMSolverMultistepScheduler(
        beta_schedule=schedule, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"
    )
    theirs.set_timesteps(timesteps=diffusion.timestep_map[::-1].tolist())
    denoise, x_T = toy(diffusion), draws("x_T", 1)[0]
    x = torch.from_numpy(x_T.copy())
    for t in theirs.timesteps:
        output = denoise(x.numpy(), np.full(len(x), int(t), np.int32))
        x = theirs.step(torch.from_numpy(np.array(output)), t, x).prev_sample
    ours = dpm_solver_sample(diffusion, denoise, x_T)
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-4 * np.abs(x.numpy()).max())


@pytest.mark.parametrize(("sample", "order"), [(ddim_sample, 1), (dpm_solver_sample, 2)])
def test_twice_the_steps_divide_the_error_by_two_to_the_order(gaussian_data, keys, sample, order):
    """Gaussian data has a known path: x_t - alpha_t mean stays in proportion to its own deviation."""
    x_T, mean, std = initial_noise(keys, (4, 4, 3)), 0.3, 0.5
    errors = []
    for steps in (25, 49, 97):  # whose timesteps lie inside each other
        diffusion = GaussianDiffusion.create(f"{steps}", "squaredcos_cap_v2", variance="fixed_small")
        denoise = gaussian_data(diffusion, mean, std)
        _, states = sample(diffusion, denoise, x_T, None, trajectory_every=1)
        abar = diffusion.alphas_cumprod[[0, -1]]
        deviation = np.sqrt(abar * std**2 + 1 - abar)
        exact = np.sqrt(abar[0]) * mean + deviation[0] / deviation[1] * (x_T - np.sqrt(abar[1]) * mean)
        errors.append(float(jnp.abs(states[-2] - exact).max()))
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(np.log2(ratios), order, atol=0.25)


def test_dpm_solver_draws_its_data_clips_and_conditions(gaussian_data, toy, keys, draws):
    diffusion = GaussianDiffusion.create("50", "squaredcos_cap_v2", variance="fixed_small")
    mean, std = moments_of_samples(diffusion, gaussian_data(diffusion, 0.3, 0.5), dpm_solver_sample, keys)
    assert abs(mean - 0.3) < 0.02 and abs(std - 0.5) < 0.02
    diffusion, x_T = GaussianDiffusion.create("10"), 3 * draws("x_T", 1)[0]
    assert jnp.abs(dpm_solver_sample(diffusion, toy(diffusion), x_T, clip_denoised=True)).max() <= 1
    one = GaussianDiffusion.create("1")
    for cond_fn in (None, lambda x, t: -0.3 * x):  # a single step is DDIM's
        np.testing.assert_allclose(
            dpm_solver_sample(one, toy(one), x_T, cond_fn=cond_fn),
            ddim_sample(one, toy(one), x_T, None, cond_fn=cond_fn),
            rtol=1e-5,
        )


def test_a_denoiser_for_each_step_is_used_at_its_step(toy, draws):
    diffusion, x_T, noise = GaussianDiffusion.create("10"), draws("x_T", 1)[0], draws("ddpm", 10)
    early, late = toy(diffusion), lambda x, t: 0.5 * toy(diffusion)(x, t)
    mixed = lambda x, t: jnp.where((t < diffusion.timestep_map[4])[:, None, None, None], late(x, t), early(x, t))  # noqa: E731
    for sample in (partial(ddpm_sample, noise=noise), ddim_sample, dpm_solver_sample):
        _, whole = sample(diffusion, mixed, x_T, None, trajectory_every=3)
        _, parts = sample(diffusion, [late] * 4 + [early] * 6, x_T, None, trajectory_every=3)
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_condition_sees_original_timesteps():
    diffusion = GaussianDiffusion.create("2", prediction="x_start", variance="fixed_large")
    zeros = jnp.zeros((1, 2, 2, 1))
    _, states = ddpm_sample(
        diffusion,
        lambda x, t: jnp.zeros_like(x),
        zeros,
        None,
        cond_fn=lambda x, t: jnp.broadcast_to(t[:, None, None, None], x.shape),
        noise=jnp.zeros((2, *zeros.shape)),
        trajectory_every=1,
    )
    np.testing.assert_allclose(states[0], 999 * diffusion.betas[1], rtol=1e-5)
    np.testing.assert_allclose(states[1], 0.0, atol=1e-7)


def moments_of_samples(diffusion, denoise, sample, keys):
    keys = jax.vmap(jax.random.split)(keys).reshape(-1)
    x = jax.jit(partial(sample, diffusion, denoise))(initial_noise(keys, (32, 32, 1)), keys)
    return float(x.mean()), float(x.std())


@each_sampler
def test_a_perfect_denoiser_draws_its_data(gaussian_data, keys, sample):
    diffusion = GaussianDiffusion.create(variance="fixed_small")
    mean, std = moments_of_samples(diffusion, gaussian_data(diffusion, 0.3, 0.5), sample, keys)
    assert abs(mean - 0.3) < 0.02 and abs(std - 0.5) < 0.02


def test_inverting_and_sampling_again_returns_to_the_start_the_nearer_the_more_steps(gaussian_data, keys):
    x0 = initial_noise(keys, (4, 4, 3)) * 0.5 + 0.3
    errors = []
    for respacing in ("50", "250"):
        diffusion = GaussianDiffusion.create(respacing, variance="fixed_small")
        denoise = gaussian_data(diffusion, 0.3, 0.5)
        x_T = ddim_invert(diffusion, denoise, x0)
        assert 0.9 < float(x_T.std()) < 1.1
        errors.append(float(jnp.abs(ddim_sample(diffusion, denoise, x_T, None) - x0).max()))
    assert errors[0] < 0.2 and errors[1] < errors[0] / 3


@pytest.mark.parametrize("name", ["ddpm", "ddim_eta"])
def test_an_image_depends_on_its_own_key_only(toy, keys, name):
    diffusion = GaussianDiffusion.create("10")
    run = jax.jit(lambda keys: SAMPLERS[name](diffusion, toy(diffusion), initial_noise(keys, (4, 4, 4)), keys))
    x, chosen = run(keys), np.array([7, 0, 3])
    np.testing.assert_allclose(run(keys[chosen]), x[chosen], rtol=1e-6, atol=1e-6)
    assert len(np.unique(np.asarray(x)[:, 0, 0, 0])) == len(keys)


def test_the_keys_draw_the_noise_they_promise(toy, keys):
    diffusion = GaussianDiffusion.create("10")
    x_T = initial_noise(keys, (4, 4, 4))
    noise = [[jax.random.normal(jax.random.fold_in(key, i), (4, 4, 4)) for key in keys] for i in range(10)]
    noise = np.array(noise)
    by_keys = ddpm_sample(diffusion, toy(diffusion), x_T, keys)
    np.testing.assert_allclose(
        by_keys, ddpm_sample(diffusion, toy(diffusion), x_T, None, noise=noise), rtol=1e-6, atol=1e-6
    )
    raw = ddpm_sample(diffusion, toy(diffusion), x_T, jax.random.key_data(keys))
    np.testing.assert_array_equal(by_keys, raw)
    assert np.abs(noise - x_T).min(axis=(1, 2, 3, 4)).max() > 0 and not (noise == np.asarray(x_T)).any()


@each_sampler
@pytest.mark.parametrize("every", [3, 5, 10, 40])
def test_the_trajectory_is_the_loop_stopped_every_k_steps(toy, draws, sample, every):
    diffusion = GaussianDiffusion.create("10")
    x_T, noise = draws("x_T", 1)[0], draws("ddpm", 10)
    run = partial(sample, diffusion, toy(diffusion), x_T, None, noise=noise)
    x, states = run(trajectory_every=every)
    _, all_states = run(trajectory_every=1)
    stops = [*range(every, 10, every), 10]
    assert states.shape == (len(stops), *x_T.shape)
    np.testing.assert_allclose(states, all_states[np.array(stops) - 1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(states[-1], x)
    np.testing.assert_allclose(x, run(), rtol=1e-6, atol=1e-6)


def test_every_state_of_a_ddpm_trajectory_is_one_step_by_hand(toy, keys, draws):
    diffusion = GaussianDiffusion.create("10")
    x, noise = draws("ddpm", 1)[0], draws("ddpm", 10)
    _, states = ddpm_sample(diffusion, toy(diffusion), x, None, noise=noise, trajectory_every=1)
    for state, t, draw in zip(states, reversed(range(10)), noise, strict=True):
        output = toy(diffusion)(x, np.full(3, diffusion.timestep_map[t]))
        p = diffusion.p_mean_variance(output, x, np.full(3, t))
        x = p.mean + (t > 0) * np.exp(0.5 * p.log_variance) * draw
        np.testing.assert_allclose(state, x, atol=1e-5)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("name", [*SAMPLERS, "dpm_solver", "ddim_invert", "bits_per_dim"])
def test_a_loop_is_one_scan_whose_program_does_not_grow_with_steps(toy, keys, name):
    def program(respacing):
        diffusion = GaussianDiffusion.create(respacing)
        x = jnp.zeros((8, 4, 4, 4))
        if name == "bits_per_dim":
            noise = jnp.zeros((diffusion.num_steps, *x.shape))
            return jax.make_jaxpr(partial(diffusion.bits_per_dim, toy(diffusion)))(x, noise)
        if name == "ddim_invert":
            return jax.make_jaxpr(partial(ddim_invert, diffusion, toy(diffusion)))(x)
        if name == "dpm_solver":
            return jax.make_jaxpr(partial(dpm_solver_sample, diffusion, toy(diffusion)))(x)
        return jax.make_jaxpr(partial(SAMPLERS[name], diffusion, toy(diffusion)))(x, keys)

    sizes = {}
    for respacing in ("10", "250"):
        names = [equation.primitive.name for equation in equations(program(respacing).jaxpr)]
        assert names.count("scan") == 1 and "while" not in names
        sizes[respacing] = len(names)
    assert sizes["10"] == sizes["250"]


def test_a_trajectory_never_holds_more_than_the_states_it_returns(toy, keys):
    diffusion = GaussianDiffusion.create("100")
    x_T = jnp.zeros((8, 4, 4, 4))
    run = partial(ddpm_sample, diffusion, toy(diffusion), trajectory_every=20)
    program = jax.make_jaxpr(run)(x_T, keys)
    largest = max(math.prod(var.aval.shape) for equation in equations(program.jaxpr) for var in equation.outvars)
    assert largest == 5 * x_T.size


@each_sampler
def test_eight_devices_draw_what_one_does(toy, keys, sample):
    assert jax.device_count() == 8
    diffusion = GaussianDiffusion.create("10")
    run = jax.jit(partial(sample, diffusion, toy(diffusion)))
    x_T = initial_noise(keys, (4, 4, 4))
    spread = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    x = run(jax.device_put(x_T, spread), jax.device_put(keys, spread))
    assert x.sharding.is_equivalent_to(spread, x.ndim)
    np.testing.assert_allclose(x, run(x_T, keys), rtol=1e-6, atol=1e-6)


def test_noise_and_keys_that_do_not_fit_are_told(toy, keys):
    diffusion = GaussianDiffusion.create("10")
    x_T = initial_noise(keys, (4, 4, 4))
    for_toy = (diffusion, toy(diffusion), x_T)
    with pytest.raises(InputError, match="neither keys nor noise"):
        ddpm_sample(*for_toy, None)
    with pytest.raises(InputError, match=r"eta=0\.5 has neither keys nor noise"):
        ddim_sample(*for_toy, None, eta=0.5)
    with pytest.raises(InputError, match="there are 3 keys for 8 images"):
        ddpm_sample(*for_toy, keys[:3])
    with pytest.raises(InputError, match=r"expected \(10, 8, 4, 4, 4\), one draw a step"):
        ddpm_sample(*for_toy, None, noise=np.zeros((9, 8, 4, 4, 4)))
    with pytest.raises(InputError, match="eta is 2"):
        ddim_sample(*for_toy, keys, eta=2)
    with pytest.raises(InputError, match="trajectory_every is 0"):
        ddpm_sample(*for_toy, keys, trajectory_every=0)
    with pytest.raises(InputError, match="num_steps is 11; this process has 10"):
        ddim_invert(*for_toy, num_steps=11)
