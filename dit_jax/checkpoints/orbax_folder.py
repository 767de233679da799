"""A folder of weights as JAX programs keep them: Orbax arrays and a JSON record.

FOLDER/
  record.json   architecture, process, class names, provenance, checksums
  weights/      an Orbax checkpoint of the parameters
  vae/          the autoencoder in diffusers' layout, if one came along
"""

import ctypes
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.experimental.v1 import partial

from dit_jax.checkpoints.checksums import checksum
from dit_jax.checkpoints.record import Record
from dit_jax.checkpoints.torch_layout import Leaf
from dit_jax.errors import InputError
from dit_jax.files import read_json, replacing_folder, write_json
from dit_jax.models.dit import abstract_dit

RECORD = "record.json"
WEIGHTS = "weights/state"  # where Orbax puts the one pytree of a checkpoint


def write_folder(folder: Path, record: Record, leaves: Iterable[Leaf], vae: Path | None) -> None:
    """Write the folder, one parameter after the other; it appears when it is whole. It must not be there before."""
    with replacing_folder(folder) as temporary:
        sums = {}
        for path, leaf in leaves:
            sums[path] = checksum(leaf)
            partial.save(temporary / "weights", unflatten_dict({path: leaf}, sep="/"))
            del leaf  # before the next one is made
            _trim_heap()
        partial.finalize(temporary / "weights")
        write_json(temporary / RECORD, record.to_json() | {"checksums": sums})
        if vae:
            shutil.copytree(vae, temporary / "vae")


def read_record(folder: Path) -> tuple[Record, dict[str, int]]:
    """The record and the parameters' checksums."""
    fields = read_json(folder / RECORD, checksums=dict)
    try:
        sums = fields.pop("checksums")
        return Record.from_json(fields), sums
    except (KeyError, InputError) as error:
        raise InputError(f"{folder / RECORD} is not a whole record of weights ({error})") from error


def read_folder(folder: Path, record: Record, sums: dict[str, int], shardings: Callable) -> Iterator[Leaf]:
    """The parameters, one after the other, placed as `shardings` says for their shapes.

    Raises InputError if one is missing, of another shape, or not what was written.
    """
    _, abstract = abstract_dit(record.model)
    leaves = flatten_dict(abstract, sep="/")
    places = flatten_dict(shardings(abstract), sep="/")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for path in sorted(leaves, key=lambda path: leaves[path].size, reverse=True):
            shape = jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype, sharding=places[path])
            item = unflatten_dict({path: shape}, sep="/")
            how = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            try:
                leaf = flatten_dict(checkpointer.restore(folder.absolute() / WEIGHTS, args=args), sep="/")[path]
            except Exception as error:  # Orbax and TensorStore share no base class for damage
                reason = str(error).strip().split("\n")[0][:200]
                raise InputError(f"{path} of the weights in {folder} cannot be read ({reason})") from error
            if leaf.shape != shape.shape or checksum(leaf) != sums.get(path):
                raise InputError(f"{path} of the weights in {folder} is not what was written there: it is damaged")
            yield path, leaf
            del leaf  # before the next one is read


def _trim_heap() -> None:
    """Give back what TensorStore freed: glibc would keep it, for XL/2 over 1 GB at the largest parameter."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
