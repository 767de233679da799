"""What `auto` means in config.model: what is best where a program runs, by measurements and compiled steps."""

import jax
import jax.numpy as jnp

from dit_jax.parallel.chips import chip_of

FLASH_MEMORY = 100 * 2**20  # bytes that our TPU kernel may take, of the 128 MiB of v5e and v6e


def dtype(platform: str) -> str:
    """Of matrix products: what a platform multiplies fast; float32 on CPUs, of which few multiply bfloat16."""
    return "float32" if platform == "cpu" else "bfloat16"


def remat(platform: str) -> str:
    """What the backward pass computes again: on CPUs, which have the memory, nothing. S/2 trains a ninth faster so."""
    return "none" if platform == "cpu" else "dots"


def unroll(platform: str, depth: int) -> int:
    """Blocks in one iteration of the scan over depth, in training.

    On a GPU a scan copies what each block leaves for the backward pass into a stack: by its compiled step XL/2 moves
    113 GB on each of eight H100, unrolled 87. TPUs write it there at once. On a CPU of two cores S trains 1.06 to 1.11
    times as fast unrolled. The forward pass alone is no faster anywhere.
    """
    return 1 if platform == "tpu" else depth


def attention_kernel(device: jax.Device, tokens: int, head_width: int, operands: jnp.dtype) -> str:
    """What computes attention best on a device.

    On TPUs XLA's own is as good for few tokens, by the memory traffic of compiled steps: of B at 64 tokens it moves 7.0
    GB where the kernel, whose blocks are of 128 tokens, moves 7.4; of XL at 256 tokens 28 and 20, of B at 1,024 96
    and 39. On a CPU of two cores S trains 1.03 times as fast at 256 tokens by cores, and at 16 no faster.
    """
    if device.platform == "tpu":
        chip = chip_of(device)  # None before v4, where kernels multiply no bfloat16
        fits = chip and flash_heads(chip.vector_memory, tokens, 1, head_width, operands)
        return "flash" if tokens >= 256 and fits else "xla"
    if device.platform == "cpu":
        return "cores" if tokens >= 64 else "xla"
    return "cudnn" if cudnn_takes(tokens, head_width, operands) and has_cudnn_attention(device) else "xla"


def flash_heads(vector_memory: float, tokens: int, heads: int, head_width: int, operands: jnp.dtype) -> int:
    """Heads that our TPU kernel computes at once: the most that divide them all and have room, or 0.

    The backward pass takes the most: an image's queries, keys and values, their gradients and that of its output, all
    twice, since the next image comes while this one is computed; and four blocks of scores.
    """

    def taken(count: int) -> int:
        columns = 2 * lanes(3 * count * head_width) + lanes(count * head_width)
        return 2 * tokens * columns * operands.itemsize + 4 * flash_rows(tokens) * tokens * 4 + 2**19

    room = min(vector_memory, FLASH_MEMORY)
    return max((n for n in range(1, heads + 1) if heads % n == 0 and taken(n) <= room), default=0)


def flash_rows(tokens: int) -> int:
    """Queries that it computes at once."""
    return 256 if tokens % 256 == 0 else tokens


def lanes(columns: int) -> int:
    """Columns that so many take up in a TPU's vector memory."""
    return -(-columns // 128) * 128


def cudnn_takes(tokens: int, head_width: int, operands: jnp.dtype) -> bool:
    """Whether NVIDIA's fused kernel computes such attention, and its gradient."""
    return operands == jnp.bfloat16 and tokens % 2 == 0 and head_width % 8 == 0 and head_width <= 128


def has_cudnn_attention(gpu: jax.Device) -> bool:
    """Whether that kernel runs on this GPU: NVIDIA's, of 2020 (Ampere) or newer."""
    capability = getattr(gpu, "compute_capability", "")  # 9.0; of AMD's, gfx942
    return capability[:1].isdigit() and float(capability) >= 8
