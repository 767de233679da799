# shellcheck shell=bash
# Source this before training on several chips, where XLA then hides communication behind computation, or on a CPU.
# Names were checked against jaxlib 0.10.2 and 0.12.0.1, libtpu 0.0.42 and 0.0.50: one that is not known ends the program.
# What is set already comes last and wins. Sources: openxla.org/xla/gpu_optimization_levels and
# openxla.org/xla/flags_guidance, docs.nvidia.com/jax-toolbox, MaxText's benchmarks/xla_flags_library.py.

gpu=(
    # Starts collectives as early and awaits them as late as data allows; XLA leaves this off on GPUs.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # The blocks are a loop, and a collective cannot leave its iteration by itself. With these, the next block's
    # parameters are gathered, and the last block's gradients reduced, while this block computes.
    --xla_gpu_enable_pipelined_all_gather=true
    --xla_gpu_enable_pipelined_reduce_scatter=true
    --xla_gpu_enable_pipelined_all_reduce=true
    # Unrolls the loop by two, so that what a pipelined collective hands on is not copied in each iteration.
    --xla_gpu_enable_while_loop_double_buffering=true
    # Without fsdp: the stacks of what the blocks leave for the backward pass are written whole, so not zeroed first.
    --xla_gpu_enable_dus_accumulator_zero_init_elimination=true
)

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

export XLA_FLAGS="${gpu[*]} ${cpu[*]} ${XLA_FLAGS:-}"
export LIBTPU_INIT_ARGS="${tpu[*]} ${LIBTPU_INIT_ARGS:-}"
unset gpu tpu cpu
