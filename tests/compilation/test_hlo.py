"""What is read off a compiled program is what it does, however often its loops run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.compilation.collectives import Collective, collectives
from dit_jax.compilation.hlo import Program


def compiled(function, *shapes) -> Program:
    return Program(jax.jit(function).lower(*shapes).compile().as_text())


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_in_a_loop_count_as_often_as_it_runs():
    def many(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    assert compiled(many, array(16, 32), array(32, 32)).flops == 7 * 2 * 16 * 32 * 32


def test_loops_in_loops_multiply():
    def many(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0] * 2.0, None

        return jax.lax.scan(outer, x, length=5)[0]

    assert compiled(many, array(16, 32), array(32, 32)).flops == 15 * 2 * 16 * 32 * 32


def test_every_branch_that_might_run_counts():
    def one_of_two(choice, x, w):
        return jax.lax.cond(choice, lambda: jnp.tanh(x @ w), lambda: jnp.tanh(jnp.tanh(x @ w) @ w))

    shapes = jax.ShapeDtypeStruct((), bool), array(16, 32), array(32, 32)
    assert compiled(one_of_two, *shapes).flops == 3 * 2 * 16 * 32 * 32
    text = """%%left (l: f32[4,4]) -> f32[4,4] {
  %%l = f32[4,4]{1,0} parameter(0)
  ROOT %%dot = f32[4,4]{1,0} dot(%%l, %%l), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %%main (p: pred[], x: f32[4,4]) -> f32[4,4] {
  %%p = pred[] parameter(0)
  %%x = f32[4,4]{1,0} parameter(1)
  ROOT %%c = f32[4,4]{1,0} conditional(%%p, %%x, %%x), %s, metadata={op_name="cond"}
}"""
    for named in ("true_computation=%left, false_computation=%left", "branch_computations={%left, %left}"):
        assert Program(text % named).flops == 2 * 2 * 4**3


def test_a_loop_whose_counter_takes_steps_runs_until_it_has_passed_its_bound():
    """As XLA leaves it where it notes no number."""
    program = Program(
        """HloModule loop

%body (b: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %b = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%b), index=1
  %step = s32[] constant(3)
  %next = s32[] add(%i, %step)
  %same = s32[] copy(%next)
  %dot = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %more = (s32[], f32[4,4]{1,0}) tuple(%same, %dot)
}

%condition (c: (s32[], f32[4,4])) -> pred[] {
  %c = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %bound = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (m: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %m = (s32[], f32[4,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[4,4]{1,0}) while(%m), condition=%condition, body=%body
}
"""
    )
    assert program.flops == 4 * 2 * 4**3  # at 0, 3, 6 and 9


def test_products_are_told_apart_by_their_precision():
    def three(x, w):
        products = [jnp.matmul(x, w, precision=precision) for precision in ("default", "high", "highest")]
        return sum(jnp.tanh(product) for product in products)

    each = 2 * 16 * 32 * 32
    told = compiled(three, array(16, 32), array(32, 32)).flops_by_precision
    assert told == {"default": each, "high": each, "highest": each}
    text = """ENTRY %main (a: bf16[4,8], b: bf16[8,2]) -> f32[4,2] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  ROOT %dot = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, operand_precision={highest,highest}
}"""
    assert Program(text).flops_by_precision == {"narrow": 2 * 4 * 8 * 2}


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 1, 1), (1, 1, 0)])
def test_convolutions_count_the_products_that_are_not_with_padding(size, stride, padding):
    def convolve(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        sides = ((padding, padding),) * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), sides, dimension_numbers=layout)

    places = np.arange(-padding, 8 + padding - size + 1, stride)[:, None] + np.arange(size)
    inside = int(((places >= 0) & (places < 8)).sum())
    program = compiled(convolve, array(2, 8, 8, 4), array(size, size, 4, 6))
    assert program.flops == 2 * 2 * inside**2 * 4 * 6


def test_convolutions_with_values_or_taps_apart_count_no_product_with_what_is_between():
    def spread(x, kernel):  # of 22 places a side every third one holds a value
        layout, sides = ("NHWC", "HWIO", "NHWC"), ((0, 0),) * 2
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), sides, (3, 3), (2, 2), dimension_numbers=layout)

    places = np.arange(22 - 2)[:, None] + 2 * np.arange(2)  # what two taps, two apart, meet
    met = int((places % 3 == 0).sum())
    assert met == 14  # of 40
    assert compiled(spread, array(2, 8, 8, 4), array(2, 2, 4, 6)).flops == 2 * 2 * met**2 * 4 * 6


def test_convolutions_that_a_gpu_hands_to_cudnn_count_too():
    """With a bias and a scratch buffer, and labels as XLA chooses them there."""
    program = Program(
        """HloModule encode

ENTRY %main (x: f32[2,8,8,4], kernel: f32[6,3,3,4], bias: f32[6]) -> f32[2,8,8,6] {
  %x = f32[2,8,8,4]{3,2,1,0} parameter(0)
  %kernel = f32[6,3,3,4]{3,2,1,0} parameter(1)
  %bias = f32[6]{0} parameter(2)
  %conv = (f32[2,8,8,6]{3,2,1,0}, u8[1024]{0}) custom-call(%x, %kernel, %bias), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", backend_config={}
  ROOT %y = f32[2,8,8,6]{3,2,1,0} get-tuple-element(%conv), index=0
}
"""  # noqa: E501
    )
    assert program.flops == 2 * 2 * (3 * 8 - 2) ** 2 * 4 * 6


def test_reading_and_writing_a_large_array_is_its_traffic():
    program = compiled(lambda x: x * 2.0 + 1.0, array(1024, 1024))
    assert program.traffic == 2 * 4 * 1024 * 1024


def test_what_lies_in_a_cores_own_memory_is_no_traffic():
    """S(1) in a layout: what TPUs fetch ahead, and write back."""
    program = Program(
        """HloModule step

ENTRY %main (far: f32[8,64], i: s32[]) -> f32[8,64] {
  %far = f32[8,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %fetching = (f32[8,64]{1,0:S(1)}, f32[8,64]{1,0}, u32[]) copy-start(%far)
  %near = f32[8,64]{1,0:S(1)} copy-done(%fetching)
  %moving = ((f32[8,64]{1,0}), f32[2,64]{1,0}, s32[]) slice-start(%far), slice={[0:2], [0:64]}
  %two = f32[2,64]{1,0} slice-done(%moving)
  %row = f32[1,64]{1,0:S(1)} dynamic-slice(%far, %i, %i), dynamic_slice_sizes={1,64}
  %kept = f32[1,64]{1,0:S(1)} dynamic-slice(%near, %i, %i), dynamic_slice_sizes={1,64}
  %out = f32[1,64]{1,0} dynamic-slice(%near, %i, %i), dynamic_slice_sizes={1,64}
  %sum = f32[1,64]{1,0:S(1)} add(%row, %kept)
  %back = f32[8,64]{1,0} dynamic-update-slice(%far, %sum, %i, %i)
  %both = f32[8,64]{1,0} dynamic-update-slice(%back, %out, %i, %i)
  %inner = f32[8,64]{1,0:S(1)} dynamic-update-slice(%near, %sum, %i, %i)
  ROOT %end = f32[8,64]{1,0} add(%inner, %both)
}
"""
    )
    row = 4 * 64
    moved = {i.name: program.moved("main", i) / row for _, i, _ in program.instructions() if program.moved("main", i)}
    assert moved == {"fetching": 8, "moving": 4, "row": 1, "out": 1, "back": 1, "both": 2, "end": 16}


def test_a_slice_of_a_stack_is_all_that_a_loop_reads_of_it():
    def through(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x + w), None), x, stack)[0]

    program = compiled(through, array(256, 256), array(64, 256, 256))
    stack = 4 * 64 * 256 * 256
    assert stack < program.traffic < 6 * stack  # reading all of it each time would be 64


def test_a_slice_in_a_fusion_in_a_fusion_is_all_that_is_read():
    """So TPUs read a block's weights: this is what their compiler writes."""
    program = Program(
        """HloModule stack

%slice.1 (p0: bf16[12,8,16], p1: s32[]) -> bf16[8,16] {
  %p0 = bf16[12,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0} bitcast(%one)
}

%product.1 (q0: bf16[4,8], q1: bf16[12,8,16], q2: s32[]) -> bf16[4,16] {
  %q0 = bf16[4,8]{1,0} parameter(0)
  %q1 = bf16[12,8,16]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %w = bf16[8,16]{1,0} fusion(%q1, %q2), kind=kLoop, calls=%slice.1
  ROOT %y = bf16[4,16]{1,0} dot(%q0, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[4,8], stack: bf16[12,8,16], i: s32[]) -> bf16[4,16] {
  %x = bf16[4,8]{1,0} parameter(0)
  %stack = bf16[12,8,16]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %out = bf16[4,16]{1,0} fusion(%x, %stack, %i), kind=kOutput, calls=%product.1
}
"""
    )
    assert program.traffic == 2 * (4 * 8 + 8 * 16 + 4 * 16) + 4


def test_a_slice_of_a_stack_seen_in_another_layout_is_all_that_is_read():
    """So TPU7x reads what a block left for the backward pass."""
    program = Program(
        """HloModule stack

%view.1 (v: bf16[12,8,16]) -> bf16[12,8,16] {
  %v = bf16[12,8,16]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %same = bf16[12,8,16]{2,1,0:T(8,128)(2,1)} copy(%v)
}

%slice.1 (p0: bf16[12,8,16], p1: s32[]) -> bf16[1,8,16] {
  %p0 = bf16[12,8,16]{2,1,0:T(16,128)(2,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %seen = bf16[12,8,16]{2,1,0:T(8,128)(2,1)} fusion(%p0), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%view.1
  ROOT %one = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} dynamic-slice(%seen, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

ENTRY %main (stack: bf16[12,8,16], i: s32[]) -> bf16[1,8,16] {
  %stack = bf16[12,8,16]{2,1,0:T(16,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %one = bf16[1,8,16]{2,1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%slice.1
}
"""  # noqa: E501
    )
    assert program.traffic == 2 * 8 * 16 * 2 + 4


def test_what_is_begun_and_awaited_counts_as_if_done_at_once():
    """So XLA of JAX 0.12 writes for GPUs: a slice, a sum over devices with its operand in its shape, and an update."""
    program = Program(
        """HloModule step, num_partitions=8

%take (stack: f32[28,64], i: s32[]) -> f32[1,64] {
  %stack = f32[28,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,64]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,64}
}

%put (stack: f32[28,64], one: f32[1,64], i: s32[]) -> f32[28,64] {
  %stack = f32[28,64]{1,0} parameter(0)
  %one = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %more = f32[28,64]{1,0} dynamic-update-slice(%stack, %one, %i, %zero)
}

ENTRY %main (stack: f32[28,64], i: s32[]) -> f32[28,64] {
  %stack = f32[28,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %fusion-start = ((f32[28,64]{1,0}, s32[]), f32[1,64]{1,0}, u32[]) fusion-start(%stack, %i), kind=kLoop, calls=%take
  %one = f32[1,64]{1,0} fusion-done(%fusion-start)
  %all-reduce-start = ((f32[1,64]{1,0}), f32[1,64]{1,0}) all-reduce-start(%one), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %sum = f32[1,64]{1,0} all-reduce-done(%all-reduce-start)
  %fusion-start.1 = ((f32[28,64]{1,0}, f32[1,64]{1,0}, s32[]), f32[28,64]{1,0}, u32[]) fusion-start(%stack, %sum, %i), kind=kLoop, calls=%put
  ROOT %more = f32[28,64]{1,0} fusion-done(%fusion-start.1)
}
"""  # noqa: E501
    )
    row, index = 4 * 64, 4
    moved = {i.name: program.moved("main", i) for _, i, _ in program.instructions() if program.moved("main", i)}
    assert moved == {
        "fusion-start": 2 * row + index,
        "all-reduce-start": 2 * row,
        "fusion-start.1": 2 * row + index,
    }
    assert collectives(program) == {"all-reduce": Collective(1, 2 * 7 / 8 * row, 0)}


def test_what_another_core_of_the_chip_sends_counts():
    """So TPU7x gathers and sums, by its SparseCores."""
    program = Program(
        """HloModule step, num_partitions=16

%gather (part: bf16[1,64]) -> bf16[16,64] {
  %part = bf16[1,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,64]{1,0} all-gather(%part), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}
}

ENTRY %main (part: bf16[1,64]) -> bf16[16,64] {
  %part = bf16[1,64]{1,0} parameter(0)
  %begun = ((bf16[1,64]{1,0}), bf16[16,64]{1,0}) call-start(%part), async_execution_thread="sparsecore", to_apply=%gather
  ROOT %whole = bf16[16,64]{1,0} call-done(%begun)
}
"""  # noqa: E501
    )
    assert collectives(program)["all-gather"].bytes == 15 / 16 * 2 * 16 * 64
    assert program.traffic == 2 * (16 + 1) * 64
