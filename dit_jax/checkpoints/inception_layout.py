"""FID's Inception-v3 under the names and shapes of its PyTorch state dict, in a file."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.checkpoints.files import find
from dit_jax.checkpoints.tensor_files import PICKLES, SAFETENSORS, check_shapes, read_tensors
from dit_jax.errors import InputError
from dit_jax.models.inception import InceptionV3, abstract_inception

# Modules have the same names here and there. A parameter of ours, its name there and the order of our axes there: by
# number of axes, as torch.nn.Conv2d keeps (out, in, height, width) and torch.nn.Linear (out, in).
PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}

# What files may hold beside it: counters of training steps, and the classifier in the middle that only training uses.
COUNTER, AUXILIARY = ".num_batches_tracked", "AuxLogits."


def read_inception(path: str | Path) -> dict:
    """The parameters, as `abstract_inception` has them, in a .pth or .safetensors file, such as the published
    `pt_inception-2015-12-05-6726825d.pth`, or under the name that `dit_jax.download` has fetched it by.

    Raises InputError if there is no such thing, it is damaged, or it is not that network.
    """
    path = find(path)
    if path.is_dir() or path.suffix not in (SAFETENSORS, *PICKLES):
        raise InputError(f"{path} is no file of Inception's weights: expected {', '.join((*PICKLES, SAFETENSORS))}")
    tensors, _ = read_tensors(path)
    try:
        return to_params(tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def from_state_dict(state_dict: Mapping[str, np.ndarray]) -> InceptionV3:
    """The network with the given weights, as float32. Raises InputError as `to_params` does."""
    graph, _ = abstract_inception()
    return nnx.merge(graph, to_params(state_dict))


def to_params(state_dict: Mapping[str, np.ndarray]) -> dict:
    """The parameters, as `abstract_inception` has them, from a state dict.

    Raises InputError, naming the tensors, if one is missing, extra or of another shape.
    """
    _, abstract = abstract_inception()
    leaves = flatten_dict(abstract)
    expected = {their_name(path): tuple(leaf.shape[axis] for axis in AXES[leaf.ndim]) for path, leaf in leaves.items()}
    found = {
        name: array.shape
        for name, array in state_dict.items()
        if not (name.endswith(COUNTER) or name.startswith(AUXILIARY))
    }
    check_shapes("FID's Inception-v3 of 2015-12-05", expected, found)
    return unflatten_dict(
        {
            path: jnp.asarray(np.transpose(state_dict[their_name(path)], np.argsort(AXES[leaf.ndim])), jnp.float32)
            for path, leaf in leaves.items()
        }
    )


def their_name(path: tuple[str, ...]) -> str:
    """The name there of a parameter of ours, such as `Mixed_5b.branch1x1.bn.running_mean`."""
    *modules, parameter = path
    return ".".join([*modules, PARAMETERS[parameter]])
