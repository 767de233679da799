"""How fast a part is on this machine: medians of several measurements, as a table and as JSON.

WHAT is train (the step, the loader left out), sample, forward (one pass of the network), data (what the loader
delivers) or encode (images to moments and back).

Examples:
  python -m dit_jax.benchmark train --config=configs/imagenet256.py:DiT-S/2 --config.batch_size=8 --profile=traces
  python -m dit_jax.benchmark sample --config=configs/digits.py --config.batch_size=64 --config.sample.steps=20
  python -m dit_jax.benchmark forward --config=configs/imagenet256.py:DiT-S/2 --config.batch_size=8 --peer=diffusers
  python -m dit_jax.benchmark data --config=configs/imagenet256.py --config.data.source=latents:data/imagenet256
  python -m dit_jax.benchmark encode --peer=diffusers --image_size=256 --batch=1 --json=speed.json
"""

from absl import flags
from ml_collections import config_flags

from dit_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", help_string="All but encode: a training config.")
JSON = flags.DEFINE_string("json", None, "File for the figures.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each.", lower_bound=1)
PEER = flags.DEFINE_enum("peer", None, ["diffusers"], "For forward and encode: measured in turn with ours.")
PROFILE = flags.DEFINE_string("profile", None, "For train and sample: folder for a trace that XProf shows.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "For encode. Default: Stable Diffusion's, with random weights.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "For encode: side of the images, pixels.", lower_bound=8)
BATCH = flags.DEFINE_integer("batch", 1, "For encode: images at once.", lower_bound=1)

WHAT = ("train", "sample", "forward", "data", "encode")
ONLY_FOR = {"peer": ("forward", "encode"), "profile": ("train", "sample")}


def main(what: str) -> None:
    from dit_jax.errors import InputError

    if what not in WHAT:
        raise InputError(f"{what!r}: expected one of {', '.join(WHAT)}")
    for flag, parts in ONLY_FOR.items():
        if flags.FLAGS[flag].value and what not in parts:
            raise InputError(f"--{flag} goes with {' and '.join(parts)}, not with {what}")
    config = CONFIG.value
    if config is None and what != "encode":
        raise InputError(f"benchmark {what} needs --config")

    from dit_jax.benchmarks import parts, rates
    from dit_jax.files import write_json

    rows = {
        "train": lambda: parts.train(config, REPEATS.value, PROFILE.value),
        "sample": lambda: parts.sample(config, REPEATS.value, PROFILE.value),
        "forward": lambda: parts.forward(config, REPEATS.value, PEER.value),
        "data": lambda: parts.data(config, REPEATS.value),
        "encode": lambda: parts.encode(AUTOENCODER.value, IMAGE_SIZE.value, BATCH.value, REPEATS.value, PEER.value),
    }[what]()
    print(rates.table(rows))
    if JSON.value:
        write_json(JSON.value, rows)


if __name__ == "__main__":
    cli.run(main, arguments=("WHAT",))
