import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.likelihood import discretized_gaussian_nll, gaussian_kl
from dit_jax.errors import InputError

LOSSES = {
    "mse": {},
    "rescaled_mse": {"loss": "rescaled_mse"},
    "rescaled_kl": {"loss": "rescaled_kl"},
    "mse_xstart": {"prediction": "x_start"},
    "mse_fixed_large": {"variance": "fixed_large"},
    "kl_fixed_small": {"loss": "rescaled_kl", "variance": "fixed_small"},
}


def relative(ours, golden):
    return np.abs(ours - golden).max() / np.abs(golden).max()


@pytest.fixture
def batch(golden):
    return golden("loss/x0"), golden("loss/t"), golden("loss/noise")


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("respacing", ["full", "250", "50", "ddim50", "10,15,20"])
def test_tables_equal_the_published_ones(golden, schedule, respacing):
    diffusion = GaussianDiffusion.create("" if respacing == "full" else respacing, schedule)
    names = [name for name in golden.names if name.startswith(f"table/{schedule}/{respacing}/")]
    assert len(names) == 7
    for name in names:
        table = getattr(diffusion, name.split("/")[-1])
        assert table.dtype == golden(name).dtype
        np.testing.assert_allclose(table, golden(name), rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_equal_the_published_ones(golden, batch, toy, kind, compiled):
    diffusion = GaussianDiffusion.create(**LOSSES[kind])
    losses = partial(diffusion.losses, toy(diffusion))
    terms = (jax.jit(losses) if compiled else losses)(*batch)
    names = [name for name in golden.names if name.startswith(f"loss/{kind}/")]
    assert names
    for name in names:
        assert relative(terms[name.split("/")[-1]], golden(name)) <= 2e-5, name


def test_bits_per_dim_equal_the_published_ones(golden, toy, draws):
    diffusion = GaussianDiffusion.create("10")
    x0 = np.clip(golden("loss/x0"), -1, 1)
    bits = jax.jit(partial(diffusion.bits_per_dim, toy(diffusion)))(x0, draws("bpd", 10))
    for name, ours in bits.items():
        assert relative(ours, golden(f"bpd/10/{name.replace('x_start', 'xstart')}")) <= 1e-4, name
    assert bits.keys() == {"total_bpd", "prior_bpd", "vb", "x_start_mse", "mse"}


@pytest.mark.parametrize("loss", ["mse", "rescaled_mse", "kl", "rescaled_kl"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large", "fixed_small"])
def test_the_loss_is_the_stated_sum_of_its_terms(batch, toy, loss, variance):
    diffusion = GaussianDiffusion.create("100", loss=loss, variance=variance)
    x0, _, noise = batch
    t = np.array([0, 50, 99])
    terms = diffusion.losses(toy(diffusion), x0, t, noise)
    assert {name: term.shape for name, term in terms.items()} == {"loss": (3,), "mse": (3,), "vb": (3,)}
    expected = {"kl": terms["vb"], "rescaled_kl": 100 * terms["vb"]}.get(loss, terms["mse"] + terms["vb"])
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-6)

    x_t = diffusion.q_sample(x0, t, noise)
    output = toy(diffusion)(x_t, diffusion.timestep_map[t])[..., :4]
    np.testing.assert_allclose(terms["mse"], np.mean((noise - output) ** 2, axis=(1, 2, 3)), rtol=1e-5)
    bits = dataclasses.replace(diffusion, loss="kl").losses(toy(diffusion), x0, t, noise)["vb"]
    share = {"mse": float(variance == "learned_range"), "rescaled_mse": 0.1 * (variance == "learned_range")}
    np.testing.assert_allclose(terms["vb"], share.get(loss, 1.0) * bits, rtol=1e-6)


def gradients_of_vb(loss, batch):
    """Gradients of the vb term with respect to the output's two halves."""
    x0, t, noise = batch
    output = jnp.concatenate([0.5 * noise, 0.1 * x0], axis=-1)
    diffusion = GaussianDiffusion.create(loss=loss)
    gradient = jax.grad(lambda output: diffusion.losses(lambda x, t: output, x0, t, noise)["vb"].sum())(output)
    return np.abs(gradient[..., :4]).max(axis=(1, 2, 3)), np.abs(gradient[..., 4:]).max(axis=(1, 2, 3))


@pytest.mark.parametrize("loss", ["mse", "rescaled_mse"])
def test_vb_beside_mse_trains_the_variance_alone(batch, loss):
    mean, variance = gradients_of_vb(loss, batch)
    assert (mean == 0).all() and (variance > 0).all()


def test_the_kl_loss_trains_mean_and_variance(batch):
    mean, variance = gradients_of_vb("kl", batch)
    assert (mean > 0).all() and (variance > 0).all()


def test_an_x_start_predictor_is_read_as_the_epsilon_predictor_that_implies_it(batch):
    x0, t, noise = batch
    by_epsilon = GaussianDiffusion.create(variance="fixed_small")
    by_x_start = dataclasses.replace(by_epsilon, prediction="x_start")
    x_t = by_epsilon.q_sample(x0, t, noise)
    np.testing.assert_allclose(by_epsilon.epsilon_from_x_start(x_t, t, x0), noise, atol=2e-4)
    p, p_x_start = by_epsilon.p_mean_variance(noise, x_t, t), by_x_start.p_mean_variance(x0, x_t, t)
    for ours, other in zip(p, p_x_start, strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-4)


def test_learned_variance_runs_from_the_posterior_to_beta(batch):
    x0, _, noise = batch
    t = np.array([0, 5, 9])
    diffusion = GaussianDiffusion.create("10")
    ends = {-1.0: diffusion.posterior_log_variance_clipped[t], 1.0: np.log(diffusion.betas[t])}
    for v, expected in ends.items():
        p = diffusion.p_mean_variance(np.concatenate([noise, np.full_like(noise, v)], axis=-1), x0, t)
        np.testing.assert_allclose(p.log_variance[:, 0, 0, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(p.variance, np.exp(p.log_variance), rtol=1e-6)


def test_fixed_variances_are_beta_and_the_posterior_variance(batch):
    x0, _, noise = batch
    t = np.array([0, 5, 9])
    large, small = (GaussianDiffusion.create("10", variance=f"fixed_{size}") for size in ("large", "small"))
    first, betas = large.posterior_variance[1], large.betas
    variance = large.p_mean_variance(noise, x0, t).variance[:, 0, 0, 0]
    np.testing.assert_allclose(variance, [first, betas[5], betas[9]], rtol=1e-6)
    p = small.p_mean_variance(noise, x0, t)
    np.testing.assert_allclose(p.variance[:, 0, 0, 0], small.posterior_variance[t], rtol=1e-6)
    np.testing.assert_allclose(p.log_variance[0], np.log(first), rtol=1e-6)


def test_denoised_fn_comes_before_the_clip(batch):
    x0, t, _ = batch
    diffusion = GaussianDiffusion.create(prediction="x_start", variance="fixed_small")
    clipped = diffusion.predict_x_start(x0, x0, t, clip_denoised=True, denoised_fn=lambda x: 3 * x)
    np.testing.assert_array_equal(clipped, np.clip(3 * x0, -1, 1))


def test_q_sample_has_the_mean_and_variance_of_q(golden):
    diffusion = GaussianDiffusion.create("50", "squaredcos_cap_v2")
    t = np.array([0, 25, 49])
    x0 = np.repeat(golden("loss/x0")[:, :1, :1, :1], 40_000, axis=1)
    x_t = diffusion.q_sample(x0, t, jax.random.normal(jax.random.key(0), x0.shape))
    mean, variance, log_variance = diffusion.q_mean_variance(x0, t)
    np.testing.assert_allclose(x_t.mean(axis=(1, 2, 3)), mean[:, 0, 0, 0], atol=0.02)
    np.testing.assert_allclose(x_t.var(axis=(1, 2, 3)), variance[:, 0, 0, 0], rtol=0.03)
    np.testing.assert_allclose(np.exp(log_variance), variance, rtol=1e-5)


def test_the_bound_of_a_perfect_model_is_the_entropy_of_its_data(gaussian_data):
    mean, std = 0.1, 0.2
    diffusion = GaussianDiffusion.create("50")
    # For such data p(x_{t-1} | x_t) is Gaussian too, so that a learned variance can make the bound tight.
    unknown = (
        std**2 * (1 - diffusion.alphas_cumprod) / (diffusion.alphas_cumprod * std**2 + 1 - diffusion.alphas_cumprod)
    )
    variance = diffusion.posterior_variance + diffusion.posterior_mean_coef1**2 * unknown
    lowest, highest = diffusion.posterior_log_variance_clipped, np.log(diffusion.betas)
    v = np.zeros(1000, np.float32)
    with np.errstate(invalid="ignore"):
        v[diffusion.timestep_map] = 2 * (np.log(variance) - lowest) / (highest - lowest) - 1

    def denoise(x, t):
        return jnp.concatenate(
            [
                gaussian_data(diffusion, mean, std)(x, t),
                jnp.broadcast_to(jnp.asarray(v)[t][:, None, None, None], x.shape),
            ],
            axis=-1,
        )

    x0 = mean + std * jax.random.normal(jax.random.key(0), (4, 32, 32, 1))
    noise = jax.random.normal(jax.random.key(1), (50, *x0.shape))
    bits = diffusion.bits_per_dim(denoise, x0, noise, clip_denoised=False)
    nats = 0.5 * np.log(2 * np.pi * std**2) + 0.5 * ((x0 - mean) / std) ** 2
    entropy = (nats.mean(axis=(1, 2, 3)) + np.log(255 / 2)) / np.log(2)
    np.testing.assert_allclose(bits["total_bpd"], entropy, atol=0.1)


def test_kl_of_gaussians_agrees_with_its_integral():
    mean1, log_variance1, mean2, log_variance2 = 0.3, -1.2, -0.5, 0.4
    z = np.linspace(-12, 12, 200_001)

    def log_density(mean, log_variance):
        return -0.5 * ((z - mean) ** 2 * np.exp(-log_variance) + log_variance + np.log(2 * np.pi))

    p, q = log_density(mean1, log_variance1), log_density(mean2, log_variance2)
    integral = np.sum(np.exp(p) * (p - q)) * (z[1] - z[0])
    np.testing.assert_allclose(gaussian_kl(mean1, log_variance1, mean2, log_variance2), integral, rtol=1e-5)


def test_the_8_bit_levels_hold_all_the_mass():
    levels = np.arange(256, dtype=np.float32) / 127.5 - 1
    for mean, log_variance in [(0.0, -4.0), (0.95, -3.0), (-1.0, -8.0)]:
        mass = np.exp(-discretized_gaussian_nll(levels, jnp.float32(mean), jnp.float32(log_variance)))
        np.testing.assert_allclose(mass.sum(), 1.0, atol=1e-5)


def test_a_process_is_a_static_value():
    diffusion = GaussianDiffusion.create("50")
    assert diffusion == GaussianDiffusion.create("50") and hash(diffusion) == hash(GaussianDiffusion.create("50"))
    assert diffusion != GaussianDiffusion.create("50", loss="kl")
    traces = []

    @partial(jax.jit, static_argnums=0)
    def noisy(diffusion, x):
        traces.append(diffusion)
        return diffusion.q_sample(x, jnp.zeros(1, int), x)

    noisy(diffusion, jnp.ones((1, 2, 2, 1)))
    noisy(GaussianDiffusion.create("50"), jnp.ones((1, 2, 2, 1)))
    assert len(traces) == 1


def test_a_step_outside_the_process_is_nan_not_the_last_step(batch, toy):
    x0, _, noise = batch
    diffusion = GaussianDiffusion.create("50")
    terms = jax.jit(partial(diffusion.losses, toy(diffusion)))(x0, np.array([-1, 49, 50]), noise)
    assert np.isfinite(terms["loss"]).tolist() == [False, True, False]


@pytest.mark.parametrize("variance, channels", [("learned_range", 4), ("fixed_small", 8), ("fixed_large", 3)])
def test_a_wrong_number_of_channels_is_told_with_both_numbers(batch, variance, channels):
    diffusion = GaussianDiffusion.create(variance=variance)
    expected = 8 if variance == "learned_range" else 4
    with pytest.raises(InputError, match=rf"4, 4, {channels}\).*variance='{variance}' expects {expected} channels"):
        diffusion.losses(lambda x, t: jnp.zeros((3, 4, 4, channels)), *batch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prediction": "v"},
        {"variance": "learned"},
        {"loss": "l1"},
        {"schedule": "cosine"},
        {"respacing": "2000"},
        {"steps": 10},
    ],
)
def test_an_impossible_process_is_refused_when_created(wrong):
    with pytest.raises(InputError):
        GaussianDiffusion.create(**wrong)


def test_bits_per_dim_tells_how_much_noise_it_needs(batch, toy):
    diffusion = GaussianDiffusion.create("10")
    with pytest.raises(InputError, match=r"shape \(3, 4, 4, 4\); expected \(10, 3, 4, 4, 4\)"):
        diffusion.bits_per_dim(toy(diffusion), batch[0], batch[2])
