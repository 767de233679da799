"""Every setting once, with its meaning and unit: the network's (`DiTConfig`) and a training run's (`base_config`)."""

import dataclasses
import math
import re
import sys
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dit_jax import auto
from dit_jax.errors import InputError

# depth, width, heads (Peebles & Xie 2023, table 1); the number after the slash is the patch size
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS = tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in (2, 4, 8))


class Precision(NamedTuple):
    """The dtypes of a matrix product."""

    operands: jnp.dtype
    results: jnp.dtype


PRECISIONS = {
    "float32": Precision(jnp.dtype("float32"), jnp.dtype("float32")),
    "bfloat16": Precision(jnp.dtype("bfloat16"), jnp.dtype("bfloat16")),
    "bfloat16_operands": Precision(jnp.dtype("bfloat16"), jnp.dtype("float32")),
}
CHOICES = {
    "dtype": ("auto", *PRECISIONS),
    "attention_kernel": ("auto", "xla", "cores", "cudnn", "flash"),
    "remat": ("auto", "none", "full", "dots"),
    "head_gate": ("none", "token", "condition"),
    "block": ("adaLN-Zero", "adaLN", "cross-attention", "in-context"),
}
COUNTS = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
# Fields of networks that are not the paper's adaLN-Zero DiT.
BEYOND_DIT = ("attention", "head_gate", "head_dim", "heads_left", "qk_norm", "rope", "block")
BEYOND_DIT += ("context_features", "context_tokens")


class AttentionKind(NamedTuple):
    """Who attends to whom in one block."""

    name: str
    """global: every patch to every patch. window: squares of size x size patches, each to itself; in every other block
    of consecutive ones they are moved by half their size, and cut at the borders. neighbourhood: each patch to the
    size x size around it, which stay within the image. mixed: even heads to their window, odd ones to all."""
    size: int = 0
    """Patches; 0 for global."""


def attention_layers(schedule: str, depth: int) -> tuple[AttentionKind, ...]:
    """The kind of each block's attention; `schedule` is written as `DiTConfig.attention` says.

    Raises InputError if it is not, or is not for `depth` blocks.
    """
    form = re.compile(r"(?:(global)|(window|neighbourhood|mixed):([1-9]\d*))(?:\*([1-9]\d*))?")
    parts = [form.fullmatch(part.strip()) for part in schedule.split(",")]
    if not all(parts):
        raise InputError(
            f"attention={schedule!r}: expected global, window:SIZE, neighbourhood:SIZE or mixed:SIZE, with *BLOCKS "
            "after it, and commas between"
        )
    counts = [int(part[4] or 0) for part in parts]
    rest = depth - sum(counts)
    if rest < 0 or counts.count(0) != (rest > 0):
        raise InputError(
            f"attention={schedule!r} names {sum(counts)} blocks and there are {depth}: one part, and one only, may "
            "leave out its number and takes the rest"
        )
    kinds = (AttentionKind(part[1] or part[2], int(part[3] or 0)) for part in parts)
    return tuple(kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count or rest))


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The network. Defaults are those of DiT-XL/2 on latents of 256-pixel images.

    Raises InputError, when made, if the numbers do not go together.
    """

    input_size: int = 32
    """Side of the square input, in latents or pixels."""
    patch_size: int = 2
    """Side of a patch; there are (input_size / patch_size)^2 tokens."""
    in_channels: int = 4
    """Channels of the input: 4 for latents, 3 or 1 for pixels."""
    hidden_size: int = 1152
    """Width of a token."""
    depth: int = 28
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads, each hidden_size / num_heads wide."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer in widths of a token."""
    class_dropout_prob: float = 0.1
    """Probability that training replaces a label by the null class; 0 means that there is no null class."""
    num_classes: int = 1000
    """Number of classes, without the null class; 1 for an unconditional model."""
    learn_sigma: bool = True
    """Whether the network also predicts the variance, in as many channels again."""
    downscale_freq_shift: int = 0
    """The timestep's frequencies fall as i / (128 - this); diffusers computes with 1."""
    norm2_eps: float = 1e-6
    """Epsilon of the LayerNorm before the MLP; diffusers computes with 1e-5."""
    attention: str = "global"
    """Who attends to whom, block by block: KIND[:SIZE][*BLOCKS] with commas between, as window:4*8,mixed:4*8,global*12;
    one part may leave out its number of blocks and takes the rest. Kinds: see `AttentionKind`."""
    head_gate: str = "none"
    """What opens and shuts each head before the output projection: none, token (its query's), or condition."""
    head_dim: int = 0
    """Width of a head; 0 is hidden_size / num_heads. Others are those of models whose heads were cut out."""
    heads_left: tuple[int, ...] = ()
    """Heads of each block, num_heads at most, where some lost more of them than others; () is num_heads in all."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, head by head, by their root mean square."""
    rope: bool = False
    """Whether queries and keys are rotated by their row and column, beside the fixed positions."""
    block: str = "adaLN-Zero"
    """How the condition enters a block: adaLN-Zero, adaLN (no gates), cross-attention or in-context (Peebles & Xie
    2023, fig. 3)."""
    context_features: int = 0
    """Width of the tokens of a sequence that blocks attend to (text, audio, ...); 0 for none."""
    context_tokens: int = 0
    """Tokens of that sequence, at most; 0 for none."""
    dtype: str = "auto"
    """Of matrix products: float32, bfloat16, bfloat16_operands (returned as float32: fast on CPUs with AMX), or auto
    (bfloat16 on TPU and GPU, float32 on CPU). Float32 is multiplied in JAX's default precision: on TPUs in that of
    bfloat16 and on GPUs in that of TF32, unless JAX_DEFAULT_MATMUL_PRECISION=highest."""
    attention_kernel: str = "auto"
    """What computes attention: xla, cores (CPU), cudnn (NVIDIA), flash (TPU), or auto, the best where it runs."""
    remat: str = "auto"
    """What the backward pass computes again: none, full (each whole block), dots (all but matrix products), or auto
    (dots on TPU and GPU, none on CPU)."""
    unroll: int = 0
    """Blocks in one iteration of the scan over depth: more compile longer. 0 is one, and in training the best where it
    runs (one on TPU, all on GPU and CPU)."""

    def __post_init__(self):
        object.__setattr__(self, "heads_left", tuple(self.heads_left))  # a list where it was read from JSON
        for count in COUNTS:
            if not 1 <= getattr(self, count) <= 1_000_000:
                raise InputError(f"{count}={getattr(self, count)}: expected 1 to 1000000")
        if not 1 <= self.mlp_ratio * self.hidden_size < math.inf:
            raise InputError(f"mlp_ratio={self.mlp_ratio}: the MLP's hidden layer is at least 1 wide")
        if self.input_size % self.patch_size:
            raise InputError(f"input_size={self.input_size} is not a multiple of patch_size={self.patch_size}")
        if self.hidden_size % 4 or (self.hidden_size % self.num_heads and not self.head_dim):
            raise InputError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads} and of 4"
            )
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                *others, last = choices
                raise InputError(f"{field}={getattr(self, field)!r}: expected {', '.join(others)} or {last}")
        if min(self.context_features, self.context_tokens, self.head_dim, self.unroll) < 0:
            raise InputError("context_features, context_tokens, head_dim and unroll are 0 or positive")
        if bool(self.context_features) != bool(self.context_tokens):
            raise InputError("a context has both a length and a width: set context_tokens and context_features")
        if self.rope and self.head_width % 4:
            raise InputError(f"rope=True rotates quarters of a head: its width, {self.head_width}, is no multiple of 4")
        kinds = attention_layers(self.attention, self.depth)
        if widest := max((kind.size for kind in kinds if kind.size > self.side), default=0):
            raise InputError(f"attention={self.attention!r}: {widest} patches are wider than the image's {self.side}")
        left = self.heads_left
        if left and (len(left) != self.depth or not 1 <= min(left) <= max(left) == self.num_heads):
            raise InputError(
                f"heads_left={left}: expected the heads of each of {self.depth} blocks, at least 1, and "
                f"num_heads={self.num_heads} in the block that has most"
            )
        if left and (self.context_features or self.block == "cross-attention"):
            raise InputError("heads_left: cross-attention has num_heads in every block")
        for kind, heads in zip(kinds, self.block_heads, strict=True):
            if kind.name == "mixed" and heads % 2:
                raise InputError(f"attention={self.attention!r}: half of the {heads} heads of a block are mixed in")
        if self.block == "in-context" and (self.rope or any(kind.name != "global" for kind in kinds)):
            raise InputError(
                "block='in-context' adds tokens without a place: only global attention without rope takes it"
            )
        if not 0 <= self.class_dropout_prob <= 1:
            raise InputError(f"class_dropout_prob={self.class_dropout_prob}: expected a probability")

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "DiTConfig":
        """One of the paper's twelve, `DiT-{S,B,L,XL}/{2,4,8}`, with other fields as given."""
        if name not in PRESETS:
            raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        size, patch = name.removeprefix("DiT-").split("/")
        depth, hidden_size, num_heads = SIZES[size]
        shape = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=int(patch))
        return cls(**(shape | fields))

    @property
    def out_channels(self) -> int:
        """Channels of the output: in_channels, or twice as many with a learned variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def side(self) -> int:
        """Patches in a row, and in a column."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return self.side**2

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def block_heads(self) -> tuple[int, ...]:
        """Heads of each block."""
        return self.heads_left or (self.num_heads,) * self.depth

    @property
    def head_exists(self) -> np.ndarray:
        """(depth, num_heads) bool: whether a block has so many heads."""
        return np.arange(self.num_heads) < np.array(self.block_heads)[:, None]

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.mlp_ratio * self.hidden_size)

    @property
    def label_rows(self) -> int:
        """Rows of the label table: the classes, and the null class if there is one."""
        return self.num_classes + (self.class_dropout_prob > 0)

    def resolved(self, device: jax.Device) -> "DiTConfig":
        """The same with what is best on a device in place of `auto`, and, in training, of `unroll=0`."""
        dtype = auto.dtype(device.platform) if self.dtype == "auto" else self.dtype
        kernel, operands = self.attention_kernel, PRECISIONS[dtype].operands
        if kernel == "auto":
            kernel = auto.attention_kernel(device, self.tokens, self.head_width, operands)
        remat = auto.remat(device.platform) if self.remat == "auto" else self.remat
        unroll = self.unroll or auto.unroll(device.platform, self.depth)
        return dataclasses.replace(self, dtype=dtype, attention_kernel=kernel, remat=remat, unroll=unroll)

    @property
    def here(self) -> "DiTConfig":
        """The same, resolved for the default backend."""
        return self.resolved(jax.devices()[0])

    @property
    def precision(self) -> Precision:
        """The dtypes of what goes into a matrix product here, and of what comes out."""
        return PRECISIONS[self.here.dtype]


def base_config() -> ConfigDict:
    """A training run with the released hyper-parameters of DiT; files in configs/ start here and say what differs.

    Counts are in optimiser steps and in images; sizes in pixels, or latents where the model works on latents.
    """
    c = ConfigDict()
    c.seed = 0  # of everything random: initial weights, order of the data, timesteps, noise, dropped labels
    c.steps = 400_000
    c.batch_size = 256  # images a step, over all devices
    c.accumulate = 1  # parts that a batch is split into, one after the other, to save memory
    c.ema_decay = 0.9999  # of the averaged weights, which start as a copy
    c.head_gate_penalty = 0.0  # times the mean of the heads' gates, added to the loss to shut those of little use
    c.init_from = ""  # weights to start from, of any kind that `load_dit` reads; "" starts from noise
    c.model = ConfigDict(dataclasses.asdict(DiTConfig()))
    c.context = ""  # what the model is told beside the label: words that name an image's class; "" for nothing

    c.diffusion = ConfigDict()
    c.diffusion.schedule = "linear"  # or squaredcos_cap_v2
    c.diffusion.steps = 1000
    c.diffusion.prediction = "epsilon"  # or x_start
    c.diffusion.variance = "learned_range"  # or fixed_large, fixed_small; learned needs model.learn_sigma
    c.diffusion.loss = "mse"  # or rescaled_mse, kl, rescaled_kl

    c.optimizer = ConfigDict()  # AdamW
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 0  # linear from 0
    c.optimizer.decay = "constant"  # or cosine, to 0 at the last step
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0  # largest norm of the gradient; 0 does not clip

    c.latents = ""  # "on_the_fly" encodes images inside the step; latents:DIR are encoded already
    c.autoencoder = ""  # file, folder or fetched name, for on_the_fly and previews; "" is what made the latents

    c.data = ConfigDict()
    c.data.source = ""  # digits, mnist, folder:PATH, tfds:NAME@DIR, latents:DIR or synthetic
    c.data.flip = True  # mirror every second image, by chance
    c.data.skip_corrupt = False  # replace images that cannot be read, and count them, instead of stopping
    c.data.threads = 8  # that read ahead in this process

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices on each axis; -1 takes the rest

    c.log_every = 100  # steps a line of metrics.jsonl and TensorBoard
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 5_000  # steps
    c.checkpoint.keep = 3  # newest checkpoints that are kept
    c.checkpoint.keep_every = 0  # steps whose multiples are kept for ever; 0 keeps none

    c.preview = ConfigDict()  # pictures drawn by the averaged weights while training, as `sample` says
    c.preview.every = 10_000  # steps; 0 draws none
    c.preview.count = 16  # images; their labels count up

    c.eval = ConfigDict()  # figures of pictures drawn so, against a reference
    c.eval.every = 0  # steps; 0 measures none
    c.eval.count = 1_000  # images; fewer than 50,000 make FID higher, so their number is in the figures' names
    c.eval.reference = ""  # an .npz or a folder, as dit_jax.evaluate takes it
    c.eval.features = ""  # a file of Inception's weights, inception-fid once fetched, or classifier:PATH
    c.eval.batch = 64  # images drawn and measured at once, over all devices

    c.sample = ConfigDict()  # how pictures are drawn, unless the flags of dit_jax.sample say otherwise
    c.sample.sampler = "ddpm"  # or ddim, dpm-solver++
    c.sample.steps = 250
    c.sample.guidance = 4.0  # 1 is none
    c.sample.guidance_channels = 3  # guided channels of the noise, from the first; 0 guides all
    c.sample.guidance_interval = ()  # guided noise levels, low,high of sqrt(1 / abar - 1); () guides all
    c.sample.clip_denoised = False  # keep predictions within [-1, 1]; for pixels, not for latents
    return c


# The least of numbers that would otherwise go wrong in silence, or late; and the most, where there is one.
LEAST = {
    "steps": 0,
    "ema_decay": 0,
    "head_gate_penalty": 0,
    "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.b1": 0,
    "optimizer.b2": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "log_every": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "preview.every": 0,
    "preview.count": 1,
    "eval.every": 0,
}
MOST = {"ema_decay": 1, "optimizer.b1": 1, "optimizer.b2": 1}


def require_ranges(config: ConfigDict) -> None:
    """Raise InputError for a number of a training config that is out of its range."""
    for field, least in LEAST.items():
        value = attrgetter(field)(config)
        if not least <= value <= MOST.get(field, sys.maxsize):
            expected = f"{least} to {MOST[field]}" if field in MOST else f"{least} or more"
            raise InputError(f"{field}={value}: expected {expected}")
