"""Images to a data set of latents, once, as fast as the devices encode."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dit_jax.checkpoints.codec import Codec
from dit_jax.data.latents import Example, LatentWriter
from dit_jax.data.loader import Records
from dit_jax.parallel.sharding import batch_sharding


class Account:
    """How many images were encoded and how many left out as unreadable, and where the time went."""

    def __init__(self):
        self.encoded, self.skipped = 0, 0
        self.started, self.seconds = time.perf_counter(), {}

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        total = time.perf_counter() - self.started
        images, device = (self.seconds.get(what, 0.0) / total for what in ("images", "device"))
        return (
            f"{self.encoded} images at {self.encoded / total:.1f} a second, compilation included; of the time "
            f"{images:.0%} waiting for images, {device:.0%} for the device, {1 - images - device:.0%} for the rest"
        )


def encode_shards(
    writer: LatentWriter, shards: range, records: Records, codec: Codec, mesh: Mesh, batch: int, threads: int, bar: tqdm
) -> Account:
    """Write those of `shards` that are not done.

    Threads read ahead while the devices of `mesh` encode `batch` images at a time. A record depends on its image and
    its place in the shard alone, so that an interrupted run ends with the bytes of an unbroken one.
    """
    account, encode = Account(), make_encode(codec, np.dtype(writer.settings["dtype"]), mesh)

    def examples(shard: int) -> Iterator[Example]:
        indices = slice(writer.bounds[shard], writer.bounds[shard + 1])
        reads = grain.MapDataset.source(records)[indices].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2 * batch))
        )
        with closing(iter(reads.batch(batch))) as batches:
            for moments, read in one_late(batches, lambda read: encode(padded(read["x"], batch)), account):
                bar.update(len(read["y"]))
                account.encoded += len(read["y"])
                for i, label in enumerate(read["y"]):
                    if read["skipped"][i]:
                        account.skipped += 1
                    else:
                        yield moments[i], int(label)

    for shard in shards:
        if writer.is_done(shard):
            bar.update(writer.bounds[shard + 1] - writer.bounds[shard])
        else:
            writer.write(shard, examples(shard))
    return account


def moments_shape(codec: Codec, image_size: int, channels: int) -> tuple[int, ...]:
    """(2, h, w, 2c) of a square image and its mirror image. Raises InputError if the autoencoder does not take it."""
    image = jax.ShapeDtypeStruct((2, image_size, image_size, channels), jnp.float32)
    return jax.eval_shape(codec.moments, codec.params, image).shape


def make_encode(codec: Codec, dtype: np.dtype, mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
    """x (B, S, S, C) in [-1, 1] -> (B, 2, h, w, 2c): the moments of each image and of its mirror image."""
    params = jax.device_put(codec.params, NamedSharding(mesh, PartitionSpec()))
    encode, rows = make_encode_program(codec, dtype, mesh), batch_sharding(mesh)
    return lambda x: encode(params, jax.device_put(x, rows))


def make_encode_program(codec: Codec, dtype: np.dtype, mesh: Mesh) -> Callable[[dict, jax.Array], jax.Array]:
    """The jitted (codec's params, x) -> moments of `make_encode`."""

    def encode(params: dict, x: jax.Array) -> jax.Array:
        both = jnp.stack([x, x[:, :, ::-1]], axis=1)
        moments = codec.moments(params, both.reshape(-1, *x.shape[1:]))
        return moments.reshape(*both.shape[:2], *moments.shape[1:]).astype(dtype)

    return jax.jit(encode, out_shardings=batch_sharding(mesh))


def one_late(
    batches: Iterator[dict], encode: Callable[[dict], jax.Array], account: Account
) -> Iterator[tuple[np.ndarray, dict]]:
    """(moments, batch) of each batch, fetched when the next one has been given to the device."""
    late: tuple[jax.Array, dict] | None = None
    while True:
        with account.waiting("images"):
            read = next(batches, None)
        coming = None if read is None else (encode(read), read)
        if late is not None:
            with account.waiting("device"):
                moments = np.asarray(late[0])
            yield moments, late[1]
        if coming is None:
            return
        late = coming


def padded(x: np.ndarray, rows: int) -> np.ndarray:
    """x with zeros after it, so that every batch has one shape and one program."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])
