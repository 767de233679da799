"""The network against the original's outputs, and what its configuration promises."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import DIT_CASES, TINY, golden, relative_error, seeded_dit

from dit_jax import DiT, DiTConfig, auto, guided
from dit_jax.compilation.hlo import Program
from dit_jax.config import PRESETS
from dit_jax.errors import InputError
from dit_jax.models.dit import REMAT_POLICIES, abstract_dit
from dit_jax.models.kernels import KERNELS, OPERANDS, attention_saveable

PARAMETERS = {  # FACTS: parameters with positions, at 256 pixels
    "DiT-S/2": 32_963_360,
    "DiT-S/4": 32_945_024,
    "DiT-S/8": 33_148_160,
    "DiT-B/2": 130_512_416,
    "DiT-B/4": 130_475_648,
    "DiT-B/8": 130_881_536,
    "DiT-L/2": 458_102_816,
    "DiT-L/4": 458_053_760,
    "DiT-L/8": 458_594_816,
    "DiT-XL/2": 675_129_632,
    "DiT-XL/4": 675_074_432,
    "DiT-XL/8": 675_683_072,
}


def parameter_count(config: DiTConfig) -> int:
    """With the positions, which are no parameters here but were in PyTorch."""
    _, shapes = abstract_dit(config)
    tokens = (config.input_size // config.patch_size) ** 2
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) + tokens * config.hidden_size


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    x, dout = (jax.random.normal(key, shape) for key, shape in zip(keys, [(4, 8, 8, 4), (4, 8, 8, 8)], strict=True))
    return x, jnp.array([0, 17, 500, 999]), jnp.array([0, 3, 9, 10]), dout


def forward_and_gradients(model: DiT, inputs):
    x, t, y, dout = inputs

    @jax.jit
    def run(model):
        return jax.value_and_grad(lambda model: jnp.sum(model(x, t, y) * dout))(model)

    return run(model)


@pytest.mark.parametrize("name", DIT_CASES)
def test_forward_pass_is_the_originals(name):
    case = golden(name)
    out = seeded_dit(DIT_CASES[name])(case["x"], case["t"], case["y"])
    assert relative_error(out, case["out"]) < 5e-6


@pytest.mark.parametrize("name", [name for name in DIT_CASES if "no_null" not in name])
def test_guidance_on_three_channels_is_the_originals(name):
    case, half = golden(name), len(golden(name)["cfg_x"]) // 2
    denoise = guided(seeded_dit(DIT_CASES[name]), case["cfg_y"][:half], scale=float(case["cfg_scale"]))
    out = denoise(jnp.asarray(case["cfg_x"][:half]), jnp.asarray(case["cfg_t"][:half]))
    assert relative_error(out, case["cfg_out"][:half]) < 5e-6


def test_guidance_on_all_channels_is_the_difference_of_two_passes():
    case, model = golden("dit_tiny"), seeded_dit(TINY)
    x, t, y = (jnp.asarray(case[name]) for name in ("x", "t", "y"))
    conditional, null = model(x, t, y), model(x, t, jnp.full_like(y, 10))
    noise = null + 3.0 * (conditional - null)
    expected = np.concatenate([noise[..., :4], conditional[..., 4:]], axis=-1)
    out = guided(model, y, scale=3.0, channels=None)(x, t)
    assert relative_error(out, expected) < 2e-6
    assert relative_error(guided(model, y, scale=3.0)(x, t), expected) > 1e-2  # three channels are not all


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_presets_have_the_papers_parameters(name, count):
    assert parameter_count(DiTConfig.preset(name, input_size=32)) == count


def test_presets_are_the_papers_twelve():
    assert set(PRESETS) == set(PARAMETERS)
    assert parameter_count(DiTConfig.preset("DiT-XL/2", input_size=64)) == 676_014_368


def test_initialisation_is_the_papers():
    config = dataclasses.replace(TINY, hidden_size=128, num_classes=1000)
    model = DiT(config, rngs=nnx.Rngs(0))
    weights = model.to_state_dict()
    for name, array in weights.items():
        if "adaLN" in name or name.startswith("final_layer") or name.endswith("bias"):
            assert not array.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert array.std() == pytest.approx(0.02, rel=0.03), name
        elif name != "pos_embed":
            bound = math.sqrt(6 / (array.shape[0] + math.prod(array.shape[1:])))
            assert 0.97 * bound < np.abs(array).max() <= bound, name
    assert not np.array_equal(weights["blocks.0.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"])
    out = model(jnp.ones((2, 8, 8, 4)), jnp.array([0, 999]), jnp.array([0, 1000]))
    assert not out.any()


@pytest.mark.parametrize(
    "change", [{"unroll": 3}, {"remat": "full"}, {"remat": "dots"}, {"remat": "full", "unroll": 3}]
)
def test_unrolling_and_rematerialisation_change_no_result(change, inputs):
    value, grads = forward_and_gradients(seeded_dit(TINY), inputs)
    other, other_grads = forward_and_gradients(seeded_dit(dataclasses.replace(TINY, **change)), inputs)
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(a).max() + 1e-5


def test_rematerialisation_keeps_less_for_the_backward_pass(inputs):
    x, t, y, _ = inputs

    def saved_bytes(remat):
        model = seeded_dit(dataclasses.replace(TINY, remat=remat))
        _, pullback = jax.vjp(lambda model: model(x, t, y), model)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))

    none, dots, full = saved_bytes("none"), saved_bytes("dots"), saved_bytes("full")
    assert full < 0.75 * dots < 0.75 * none


@pytest.mark.parametrize("unroll", [1, 2])
def test_what_is_not_kept_is_computed_again_unrolled_or_not(unroll, inputs):
    x, t, y, _ = inputs

    def operations(remat):
        config = dataclasses.replace(TINY, depth=2, remat=remat, unroll=unroll)
        gradient = jax.jit(jax.grad(lambda model: model(x, t, y).sum()))
        return Program(gradient.lower(DiT(config, rngs=nnx.Rngs(0))).compile().as_text()).flops

    assert operations("full") > 1.2 * operations("none")


@pytest.mark.parametrize(("remat", "runs"), [("none", 2), ("dots", 2), ("full", 3)])
def test_the_attention_kernel_runs_again_backward_only_if_everything_does(remat, runs, inputs):
    x, t, y, _ = inputs
    model = DiT(dataclasses.replace(TINY, attention_kernel="flash", remat=remat), rngs=nnx.Rngs(0))
    program = str(jax.make_jaxpr(jax.grad(lambda model: model(x, t, y).sum()))(model))
    assert program.count("pallas_call[") == runs


def test_jax_calls_cudnn_by_the_name_that_the_policy_knows():
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    assert attention_saveable(cudnn._dot_product_attention_fwd_p_wrapper)


def gpu(capability: str) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", device_kind="", compute_capability=capability)


@pytest.mark.parametrize(
    ("tokens", "width", "dtype"), [(9, 8, "bfloat16"), (4, 12, "bfloat16"), (4, 136, "bfloat16"), (4, 8, "float32")]
)
def test_what_cudnn_does_not_take_is_computed_otherwise_or_refused(tokens, width, dtype):
    assert auto.attention_kernel(gpu("9.0"), 4, 8, jnp.bfloat16) == "cudnn"
    assert auto.attention_kernel(gpu("9.0"), tokens, width, jnp.dtype(dtype)) == "xla"
    with pytest.raises(InputError, match=f"take {tokens} tokens with {dtype} heads of width {width}: expected"):
        KERNELS["cudnn"](jnp.ones((1, tokens, 3 * width), dtype), width)


@pytest.mark.parametrize(
    ("capability", "kernel"), [("7.5", "xla"), ("8.0", "cudnn"), ("9.0", "cudnn"), ("12.0", "cudnn"), ("gfx942", "xla")]
)
def test_cudnns_attention_is_for_gpus_that_have_it(capability, kernel):
    assert TINY.resolved(gpu(capability)).attention_kernel == kernel
    assert dataclasses.replace(TINY, attention_kernel="cudnn").resolved(gpu(capability)).attention_kernel == "cudnn"


def test_dots_keeps_what_cudnn_is_given_and_not_the_product_that_it_is_cut_from(capsys, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: q * k * v)
    x, kernel = jnp.ones((2, 4, 16), jnp.bfloat16), jnp.ones((16, 3 * 16), jnp.bfloat16)
    attention = jax.checkpoint(lambda x: KERNELS["cudnn"](x @ kernel, 8), policy=REMAT_POLICIES["dots"])
    jax.ad_checkpoint.print_saved_residuals(attention, x)
    printed = capsys.readouterr().out
    assert printed.count(f"bf16[2,4,2,8] named '{OPERANDS}'") == 3
    assert "bf16[2,4,48]" not in printed


@pytest.mark.parametrize(("unroll", "settled"), [(0, 0), (1, 0), (2, 1)])
def test_unrolled_blocks_hand_on_their_tokens_as_a_loop_does(unroll, settled, inputs):
    x, t, y, _ = inputs
    program = jax.make_jaxpr(DiT(dataclasses.replace(TINY, depth=2, unroll=unroll), rngs=nnx.Rngs(0)))(x, t, y)
    (scan,) = (equation for equation in program.eqns if equation.primitive.name == "scan")
    assert scan.params["unroll"] == max(1, unroll)
    assert str(scan.params["jaxpr"]).count("layout_constraint[") == settled  # in each block


def test_depth_is_one_scan(inputs):
    x, t, y, _ = inputs

    def program(depth):
        return jax.make_jaxpr(DiT(dataclasses.replace(TINY, depth=depth), rngs=nnx.Rngs(0)))(x, t, y).jaxpr

    scans = [eqn for eqn in program(5).eqns if eqn.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [5]
    assert len(program(5).eqns) == len(program(2).eqns)


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_operands"])
def test_bfloat16_is_for_matrix_products_only(dtype, inputs):
    x, t, y, _ = inputs
    model = seeded_dit(dataclasses.replace(TINY, dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    program = str(jax.make_jaxpr(model)(x, t, y))
    for operation in (" exp ", "rsqrt", " cos ", " sin "):
        assert operation in program
        assert not [line for line in program.splitlines() if operation in line and "bf16" in line.split("=")[0]]
    out = model(x, t, y)
    assert out.dtype == jnp.float32
    assert 0 < relative_error(out, np.asarray(seeded_dit(TINY)(x, t, y))) < 3e-2


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"input_size": 9}, "multiple of patch_size=2"),
        ({"hidden_size": 66}, "multiple of num_heads=4"),
        ({"depth": 0}, "depth=0"),
        ({"remat": "some"}, "none, full or dots"),
        ({"dtype": "float16"}, "bfloat16"),
        ({"class_dropout_prob": 1.5}, "probability"),
    ],
)
def test_impossible_configurations_are_refused(fields, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(TINY, **fields)


def test_unknown_preset_lists_the_known():
    with pytest.raises(InputError, match="DiT-XL/2"):
        DiTConfig.preset("DiT-XXL/2")


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 4, 8, 8), (2, 16, 16, 4)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"expects \(batch, 8, 8, 4\)"):
        seeded_dit(TINY)(jnp.zeros(shape), jnp.zeros(2), jnp.zeros(2, int))


def test_two_models_of_one_config_share_a_compilation():
    first, second = abstract_dit(TINY)[0], abstract_dit(TINY)[0]
    assert first == second and hash(first) == hash(second)
