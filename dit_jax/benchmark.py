"""How fast a part is on this machine: medians of several measurements, as a table and as JSON.

WHAT is data (what the loader delivers), or autoencoder (encoding and decoding).

Examples:
  python -m dit_jax.benchmark data --config=configs/imagenet256.py --config.data.source=latents:data/imagenet256
  python -m dit_jax.benchmark autoencoder --peer=diffusers --image_size=256 --batch=1 --json=speed.json
"""

from absl import flags
from ml_collections import config_flags

from dit_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", help_string="For data: a training config; --config.FIELD=VALUE.")
JSON = flags.DEFINE_string("json", None, "File for the figures.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each.", lower_bound=1)
PEER = flags.DEFINE_enum("peer", None, ["diffusers"], "Measured in turn with ours: the same in PyTorch.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Default: Stable Diffusion's, with random weights.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "For autoencoder: side of the images, pixels.", lower_bound=8)
BATCH = flags.DEFINE_integer("batch", 1, "For autoencoder: images at once.", lower_bound=1)


def main(what: str) -> None:
    from dit_jax.errors import InputError
    from dit_jax.files import write_json

    if what not in MEASUREMENTS:
        raise InputError(f"{what!r}: expected one of {', '.join(MEASUREMENTS)}")
    rows = MEASUREMENTS[what]()
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}}  {'images/s':>10}  {'lowest':>10}  {'highest':>10}")
    for row in rows:
        print(f"{row['name']:{width}}  {row['median']:10.2f}  {row['lowest']:10.2f}  {row['highest']:10.2f}")
    if JSON.value:
        write_json(JSON.value, rows)


def measure_data() -> list[dict]:
    """Images a second that the loader hands over, the device doing nothing else."""
    import time

    from dit_jax.data.sources import open_source
    from dit_jax.errors import InputError
    from dit_jax.parallel.mesh import make_mesh
    from dit_jax.training.inputs import open_inputs
    from dit_jax.training.loop import make_loader

    if CONFIG.value is None:
        raise InputError("benchmark data needs --config")
    config = CONFIG.value
    config.preview.every = 0  # no autoencoder is needed
    source = open_source(config.data.source)
    loader = make_loader(config, source, open_inputs(config, source), make_mesh(config.mesh))
    with loader.batches(0) as batches:
        batch = next(batches)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < 2.0:  # the threads' first reads, and how many batches are two seconds
            batch, count = next(batches), count + 1
        rates = []
        for _ in range(REPEATS.value):
            started = time.perf_counter()
            for _ in range(count):
                batch = next(batches)
            rates.append(count * len(batch["y"]) / (time.perf_counter() - started))
    return [row(f"{config.data.source}, batches of {config.batch_size}", rates)]


def measure_autoencoder() -> list[dict]:
    """Encoding and decoding, ours and the peer's in turn."""
    import jax
    import numpy as np
    from flax import nnx

    from dit_jax.checkpoints.autoencoder_layout import load_autoencoder
    from dit_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL

    given = AUTOENCODER.value
    vae = load_autoencoder(given) if given else AutoencoderKL(AutoencoderConfig(), rngs=nnx.Rngs(0))
    batch, size, side = BATCH.value, IMAGE_SIZE.value, IMAGE_SIZE.value // vae.config.downsample
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (batch, size, size, vae.config.in_channels)).astype(np.float32)
    z = rng.standard_normal((batch, side, side, vae.config.latent_channels), dtype=np.float32)
    graph, params = nnx.split(vae)
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).moments(x))
    decode = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z))
    runs = {
        "encode, ours": lambda: jax.block_until_ready(encode(params, x)),
        "decode, ours": lambda: jax.block_until_ready(decode(params, z)),
    }
    if PEER.value:
        runs |= diffusers_autoencoder(vae, x, z)
    return in_turn(runs, batch)


def diffusers_autoencoder(vae, x, z) -> dict:
    """The same weights and inputs in diffusers' PyTorch class."""
    import tempfile

    import torch
    from diffusers import AutoencoderKL

    from dit_jax.checkpoints.autoencoder_layout import save_autoencoder

    with tempfile.TemporaryDirectory() as folder:
        save_autoencoder(vae, f"diffusers:{folder}/vae")
        peer = AutoencoderKL.from_pretrained(f"{folder}/vae")
    x, z = (torch.from_numpy(a).permute(0, 3, 1, 2).contiguous() for a in (x, z))

    def without_gradients(function, argument):
        with torch.no_grad():
            return function(argument)

    return {
        "encode, diffusers": lambda: without_gradients(lambda x: peer.encode(x).latent_dist.parameters, x),
        "decode, diffusers": lambda: without_gradients(lambda z: peer.decode(z).sample, z),
    }


def in_turn(runs: dict, images: int) -> list[dict]:
    """Rows of images a second; each run once to warm up, then all of them again and again, so that whatever else
    the machine does meets all alike."""
    import time

    from tqdm import tqdm

    for call in tqdm(runs.values(), desc="warming up", unit="run"):
        call()
    rates = {name: [] for name in runs}
    for _ in tqdm(range(REPEATS.value), desc="measuring", unit="round"):
        for name, call in runs.items():
            started = time.perf_counter()
            call()
            rates[name].append(images / (time.perf_counter() - started))
    return [row(name, values) for name, values in rates.items()]


def row(name: str, rates: list[float]) -> dict:
    from statistics import median

    return {"name": name, "median": median(rates), "lowest": min(rates), "highest": max(rates)}


MEASUREMENTS = {"data": measure_data, "autoencoder": measure_autoencoder}

if __name__ == "__main__":
    cli.run(main, arguments=("WHAT",))
