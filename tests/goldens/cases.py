"""Golden cases as the project speaks: channels last, weights from `seeded`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from goldens.seeded import seeded_weights

from dit_jax import AutoencoderConfig, AutoencoderKL, DiT, DiTConfig
from dit_jax.models.autoencoder import abstract_autoencoder
from dit_jax.models.dit import abstract_dit

FOLDER = Path(__file__).parent

TINY = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=3, num_heads=4, num_classes=10)

TINY_AUTOENCODER = AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)

DIT_CASES = {
    "dit_tiny": TINY,
    "dit_tiny_rgb_fixed_sigma": DiTConfig(
        input_size=16,
        patch_size=4,
        in_channels=3,
        hidden_size=64,
        depth=3,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
    ),
    "dit_tiny_no_null_class": DiTConfig(
        input_size=8,
        patch_size=1,
        in_channels=4,
        hidden_size=64,
        depth=3,
        num_heads=4,
        num_classes=10,
        class_dropout_prob=0,
    ),
    "dit_S_4_256": DiTConfig.preset("DiT-S/4"),
}


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file, pictures (4 axes, channels second) turned channels-last."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        pictures = {key for key in arrays if arrays[key].ndim == 4 and "/" not in key}
        return {key: np.moveaxis(arrays[key], 1, -1) if key in pictures else arrays[key] for key in arrays}


def seeded_dit(config: DiTConfig) -> DiT:
    """The model whose weights `seeded.py` makes from the names and shapes of its state dict."""
    graph, params = abstract_dit(config)
    empty = nnx.merge(graph, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params))
    shapes = {name: a.shape for name, a in empty.to_state_dict().items() if name != "pos_embed"}
    return DiT.from_state_dict(config, seeded_weights(shapes))


def seeded_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """As `seeded_dit`."""
    shapes = {name: a.shape for name, a in empty_autoencoder(config).to_state_dict().items()}
    return AutoencoderKL.from_state_dict(config, seeded_weights(shapes))


def empty_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """All zeros."""
    graph, shapes = abstract_autoencoder(config)
    return nnx.merge(graph, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


def random_like(tree, scale: float):
    """NumPy's normal numbers in the shapes of the leaves: JAX would compile a program for each shape."""
    normal = lambda a: np.random.default_rng(a.size).standard_normal(a.shape, np.float32)  # noqa: E731
    return jax.tree.map(lambda a: jnp.asarray(np.float32(scale) * normal(a)), tree)


def relative_error(ours: jax.Array, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest output."""
    return float(jnp.abs(ours - theirs).max() / np.abs(theirs).max())
