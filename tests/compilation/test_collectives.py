"""What is read off a compiled program is what its devices send each other, and what of it leaves a host."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_jax.compilation.collectives import Collective, collectives
from dit_jax.compilation.hlo import Program
from dit_jax.parallel.mesh import make_mesh


def test_what_devices_send_is_what_ring_algorithms_send():
    mesh = make_mesh({"data": 8})
    rows = NamedSharding(mesh, P("data"))

    def mean_gradient(w, x):
        return jax.grad(lambda w: ((x @ w) ** 2).sum())(w)

    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, P())
        step = jax.jit(mean_gradient, out_shardings=whole)
        w = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=whole)
        x = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=rows)
        text = step.lower(w, x).compile().as_text()
    whole = 4 * 32 * 64
    assert collectives(Program(text)) == {"all-reduce": Collective(1, 2 * 7 / 8 * whole, 0)}
    hosts = [0, 0, 0, 0, 1, 1, 1, 1]
    assert collectives(Program(text), hosts) == {"all-reduce": Collective(1, 2 * 7 / 8 * whole, 2 * 1 / 2 * whole / 4)}


def test_what_slices_exchange_is_told_apart_and_operations_may_share_a_channel():
    """So libtpu writes a gather that three fusions carry out, and a sum over two slices, in a loop of seven rounds."""
    program = Program(
        """HloModule step, num_partitions=4

%start (p: f32[8,32]) -> f32[32,32] {
  %p = f32[8,32]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[32,32]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%finish (p: f32[8,32]) -> f32[32,32] {
  %p = f32[8,32]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[32,32]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%other (p: f32[2,32]) -> f32[8,32] {
  %p = f32[2,32]{1,0} parameter(0)
  ROOT %all-gather.3 = f32[8,32]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="1"}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[2,32])) -> (s32[], f32[2,32]) {
  %state = (s32[], f32[2,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[2,32]{1,0} get-tuple-element(%state), index=1
  %y = f32[8,32]{1,0} fusion(%x), kind=kCustom, calls=%other
  %begun = f32[32,32]{1,0} fusion(%y), kind=kCustom, calls=%start
  %ended = f32[32,32]{1,0} fusion(%y), kind=kCustom, calls=%finish
  %sum = f32[32,32]{1,0} all-reduce(%ended), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %token = token[] after-all()
  %send.1 = (f32[2,32]{1,0}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true
  %sent = token[] send-done(%send.1), channel_id=1, is_host_transfer=true
  %recv.1 = (f32[2,32]{1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true
  %received = (f32[2,32]{1,0}, token[]) recv-done(%recv.1), channel_id=2, is_host_transfer=true
  %z = f32[2,32]{1,0} get-tuple-element(%received), index=0
  ROOT %next = (s32[], f32[2,32]{1,0}) tuple(%i, %z)
}

%condition (state: (s32[], f32[2,32])) -> pred[] {
  %state = (s32[], f32[2,32]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[2,32])) -> (s32[], f32[2,32]) {
  %p = (s32[], f32[2,32]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[2,32]{1,0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""  # noqa: E501
    )
    assert collectives(program) == {
        "all-gather": Collective(14, 7 * 3 / 4 * 4 * (32 + 8) * 32, 0),
        "all-reduce": Collective(7, 7 * 2 * 3 / 4 * 4 * 32 * 32, 0),
        "slice-to-slice": Collective(7, 7 * 4 * 2 * 32, 7 * 4 * 2 * 32),
    }


def test_a_sum_of_which_each_device_keeps_its_part_is_a_reduce_scatter():
    """So TPUs write it, the groups as axes of a mesh whose devices are in another order."""
    program = Program(
        """HloModule step, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[64,32]) -> f32[16,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %all-reduce.1 = f32[64,32]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %part = f32[16,32]{1,0} dynamic-slice(%all-reduce.1, %i, %i), dynamic_slice_sizes={16,32}
}

ENTRY %main (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  %own = f32[16,32]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %all = f32[64,32]{1,0} all-gather(%own), channel_id=2, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_1'}, dimensions={0}
}
"""  # noqa: E501
    )
    sent = {kind: collective.bytes for kind, collective in collectives(program).items()}
    assert sent == {"reduce-scatter": 3 * 4 * 16 * 32, "all-gather": 3 / 4 * 4 * 64 * 32}


TWO_HOSTS, PAIRS = [0] * 4 + [1] * 4, [0, 1] * 4


@pytest.mark.parametrize(
    ("operation", "hosts", "sent", "outside"),
    [
        ("all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}", TWO_HOSTS, 7 / 8, 1 / 2 / 4),
        ("all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}", TWO_HOSTS, 3 / 4, 0),
        ("all-gather(%p), replica_groups=[2,4]<=[8]", TWO_HOSTS, 3 / 4, 0),
        ("all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0)", TWO_HOSTS, 1 / 2, 1 / 2),
        ("all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0)", PAIRS, 1 / 2, 0),
        ("reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}", TWO_HOSTS, 7, 1),
        ("all-to-all(%p), replica_groups={{0,1,2,3,4,5,6,7}}", TWO_HOSTS, 7 / 8, 1 / 2),
        ("all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'a'}", TWO_HOSTS, 1, 1),
        ("all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}", TWO_HOSTS, 2 * 3 / 4, 0),
        ("all-reduce(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", PAIRS, 2 * 3 / 4, 0),
        ("all-reduce(%p), replica_groups={}", TWO_HOSTS, 2 * 7 / 8, 2 * 1 / 2 / 4),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,0},{4,5},{5,4}}", TWO_HOSTS, 1, 0),
        ("collective-permute(%p), source_target_pairs={{0,4},{4,0}}", TWO_HOSTS, 1, 1),
    ],
)
def test_what_leaves_a_host_is_told_by_who_talks_to_whom(operation, hosts, sent, outside):
    text = f"""HloModule step, num_partitions=8

ENTRY %main (p: f32[16,4]) -> f32[16,4] {{
  %p = f32[16,4]{{1,0}} parameter(0)
  ROOT %result = f32[16,4]{{1,0}} {operation}, channel_id=1
}}
"""
    kind, size = operation.partition("(")[0], 4 * 16 * 4
    assert collectives(Program(text), hosts) == {kind: Collective(1, sent * size, outside * size)}
