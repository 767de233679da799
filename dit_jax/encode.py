"""Encode images into a data set of latents, to train from.

Each image and its mirror image become the moments of their latents' posterior. The same command goes on where it was
interrupted. On several hosts, every one writes its own shards into the same folder.

Examples:
  python -m dit_jax.encode --data=folder:photos --autoencoder=sd-vae-ft-ema --out=latents/photos
  python -m dit_jax.encode --data=tfds:imagenet2012@/data --autoencoder=sd-vae-ft-ema --out=latents/512 --image_size=512
"""

from absl import flags

from dit_jax import cli
from dit_jax.parallel import processes

DATA = flags.DEFINE_string("data", None, "The images, as in config.data.source.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "A file, folder, or fetched name; identity keeps pixels.")
OUT = flags.DEFINE_string("out", None, "Folder of the data set.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images, pixels.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Of the moments that are kept.")
BATCH = flags.DEFINE_integer("batch", 8, "Images a device encodes at once, each with its mirror.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 8, "That read and decode images in this process.", lower_bound=1)
SKIP_CORRUPT = flags.DEFINE_bool("skip_corrupt", False, "Leave images out that cannot be read, instead of stopping.")
flags.adopt_module_key_flags(processes)


@processes.together()
def main() -> None:
    from functools import partial

    import jax
    from tqdm import tqdm

    from dit_jax.checkpoints.codec import open_codec
    from dit_jax.data.latents import LatentWriter
    from dit_jax.data.loader import Records
    from dit_jax.data.sources import open_source
    from dit_jax.parallel.mesh import make_mesh
    from dit_jax.training.encoding import encode_shards, moments_shape

    source, codec = open_source(DATA.value), open_codec(AUTOENCODER.value)
    settings = {
        "autoencoder": codec.about(),
        "source": repr(source),
        "image_size": IMAGE_SIZE.value,
        "shape": moments_shape(codec, IMAGE_SIZE.value, source.channels),
        "dtype": DTYPE.value,
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "class_names": list(source.class_names),
    }
    writer = LatentWriter(OUT.value, len(source), settings)
    if not writer.is_complete():
        mine = range(jax.process_index(), len(writer), jax.process_count())
        mesh = make_mesh(devices=jax.local_devices())
        total = sum(writer.bounds[shard + 1] - writer.bounds[shard] for shard in mine)
        records = Records(source, IMAGE_SIZE.value, SKIP_CORRUPT.value)
        with tqdm(total=total, unit="image", desc=f"to {OUT.value}", disable=not processes.is_first()) as bar:
            account = encode_shards(writer, mine, records, codec, mesh, BATCH.value * mesh.size, THREADS.value, bar)
        for line in processes.gather(str(account)):
            processes.say(line)
        if skipped := sum(map(int, processes.gather(str(account.skipped)))):
            processes.say(f"{skipped} images could not be read and were left out")
    if processes.is_first():
        records = writer.complete(partial(tqdm, unit="shard", desc="verifying"))
        print(f"{OUT.value} is complete: {records} records in {len(writer)} shards, every checksum right")


if __name__ == "__main__":
    flags.mark_flags_as_required(["data", "autoencoder", "out"])
    cli.run(main)
