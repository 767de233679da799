# shellcheck shell=bash
# Source this before training on several TPU slices, where XLA then hides communication behind computation, or on a CPU.
# Names were checked against jaxlib 0.10.2 and 0.12.0.1, libtpu 0.0.42 and 0.0.50: one that is not known ends the program.
# What is set already comes last and wins. Sources: openxla.org/xla/flags_guidance, MaxText's
# benchmarks/xla_flags_library.py.

# GPUs need none: XLA's latency-hiding scheduler is on there, and the flags that pipeline the collectives of loops change
# nothing in a step whose blocks are unrolled.

# Overlap within a slice (asynchronous all-gathers, fused with the computation) is libtpu's default and needs no flag.
tpu=(
    # Several slices: the gradients' all-reduce over the data centre's network runs beside the rest of the backward pass,
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    # and is pipelined over the blocks although their gradients have different sizes.
    --xla_tpu_data_parallel_opt_different_sized_ops=true
)

cpu=(
    # What is computed of the same arrays in one pass over them: AdamW's two moments, the slices that blocks are.
    --xla_backend_extra_options=xla_cpu_use_multi_output_fusion
    # Updates the parameters where they lie: without it each step copies all of them first.
    --xla_cpu_copy_insertion_use_region_analysis=true
)

export XLA_FLAGS="${cpu[*]} ${XLA_FLAGS:-}"
export LIBTPU_INIT_ARGS="${tpu[*]} ${LIBTPU_INIT_ARGS:-}"
unset tpu cpu
