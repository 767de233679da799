"""The architecture of a DiT, read off the shapes of its state dict."""

import math
import re
from collections.abc import Mapping

from dit_jax.config import SIZES, DiTConfig
from dit_jax.errors import InputError

TABLE = "y_embedder.embedding_table.weight"


def infer(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> DiTConfig:
    """The config of the network whose state dict has these names and shapes (the official ones).

    The arguments are heard where shapes leave something open:

    Args:
        num_heads: default: those of the paper's model of this depth and width.
        num_classes: as many as the label table has rows mean that there is no null class; else its last row is that.
        input_size: if there is no `pos_embed`.

    Raises InputError if the shapes are not a DiT's, or something stays open.
    """
    try:
        hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        hidden_mlp, _ = shapes["blocks.0.mlp.fc1.weight"]
        out_features, _ = shapes["final_layer.linear.weight"]
        rows, _ = shapes[TABLE]
        _, tokens, _ = shapes.get("pos_embed", (1, None, 1))
    except KeyError as error:
        some = ", ".join(sorted(shapes)[:3])
        raise InputError(f"these are not the weights of a DiT: no {error}; there are {some}, ...") from error
    except ValueError as error:
        raise InputError("these are not the weights of a DiT: a tensor has another number of axes") from error
    if min(hidden_size, in_channels, patch_size, hidden_mlp, rows) < 1:
        raise InputError("these are not the weights of a DiT: a tensor has an axis of length 0")
    depth = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name)))
    if depth > len(shapes):
        raise InputError(f"these are not the weights of a DiT: {len(shapes)} tensors are not those of {depth} blocks")
    out_channels = out_features / patch_size**2
    if out_channels not in (in_channels, 2 * in_channels):
        raise InputError(
            f"final_layer.linear.weight makes {out_channels:g} channels of x_embedder.proj.weight's {in_channels}: "
            "expected as many, or twice as many with a learned variance"
        )
    null_class = rows > 1 and num_classes != rows
    return DiTConfig(
        input_size=_input_size(tokens, patch_size, input_size),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=_heads(depth, hidden_size, num_heads),
        mlp_ratio=_ratio(hidden_mlp, hidden_size),
        class_dropout_prob=DiTConfig.class_dropout_prob if null_class else 0.0,
        num_classes=rows - null_class,
        learn_sigma=out_channels == 2 * in_channels,
    )


def _heads(depth: int, hidden_size: int, num_heads: int | None) -> int:
    known = [heads for *size, heads in SIZES.values() if size == [depth, hidden_size]]
    if not known and not num_heads:
        raise InputError(
            f"no preset has depth {depth} and width {hidden_size}, and shapes do not tell the number of heads: "
            "pass --num_heads"
        )
    return num_heads or known[0]


def _input_size(tokens: int | None, patch_size: int, input_size: int | None) -> int:
    if tokens is None and input_size is None:
        raise InputError("there is no pos_embed to tell the size of the input: pass --input_size")
    return input_size if tokens is None else math.isqrt(tokens) * patch_size


def _ratio(hidden_mlp: int, hidden_size: int) -> float:
    """The float that int(ratio * hidden_size) takes to hidden_mlp."""
    ratio = hidden_mlp / hidden_size
    return ratio if int(ratio * hidden_size) == hidden_mlp else math.nextafter(ratio, math.inf)
