"""How fast a part is on this machine: medians of several measurements, as a table and as JSON.

WHAT is train (the step, the loader left out), sample, forward (one pass of the network), data (what the loader
delivers), encode (images to moments and back) or samplers (what pictures are worth, by sampler, steps and guidance).

Examples:
  python -m dit_jax.benchmark train --config=configs/imagenet256.py:DiT-S/2 --config.batch_size=8 --profile=traces
  python -m dit_jax.benchmark sample --config=configs/digits.py --config.batch_size=64 --config.sample.steps=20
  python -m dit_jax.benchmark forward --config=configs/imagenet256.py:DiT-S/2 --config.batch_size=8 --peer=diffusers
  python -m dit_jax.benchmark data --config=configs/imagenet256.py --config.data.source=latents:data/imagenet256
  python -m dit_jax.benchmark samplers --weights=runs/digits --data=digits --json=samplers.json --plot=samplers.png
  python -m dit_jax.benchmark encode --peer=diffusers --image_size=256 --batch=1 --json=speed.json

train, sample and data measure all devices; in several processes, run in each of them, those of all. The others
measure one device, the first of each process, and the first process tells.
"""

from absl import flags
from ml_collections import config_flags

from dit_jax import cli
from dit_jax.parallel import processes

CONFIG = config_flags.DEFINE_config_file("config", help_string="All but encode and samplers: a training config.")
JSON = flags.DEFINE_string("json", None, "File for the figures.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each.", lower_bound=1)
PEER = flags.DEFINE_enum("peer", None, ["diffusers"], "For sample, forward and encode: in turn, on one device.")
PROFILE = flags.DEFINE_string("profile", None, "For train and sample: folder for a trace that XProf shows.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "For encode. Default: Stable Diffusion's, with random weights.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "For encode: side of the images, pixels.", lower_bound=8)
BATCH = flags.DEFINE_integer("batch", 1, "For encode: images at once.", lower_bound=1)
WEIGHTS = flags.DEFINE_string("weights", None, "For samplers: a run, a file or folder of weights, or a name.")
DATA = flags.DEFINE_string("data", None, "For samplers: the real images, as in config.data.source.")
COUNT = flags.DEFINE_integer("count", 1000, "For samplers: images drawn with each setting.", lower_bound=2)
FEATURES = flags.DEFINE_string("features", None, "For samplers, with --reference: classifier:PATH.")
REFERENCE = flags.DEFINE_string("reference", None, "For samplers, with --features: as dit_jax.evaluate makes it.")
PLOT = flags.DEFINE_string("plot", None, "For samplers: a PNG of the figures.")
flags.adopt_module_key_flags(processes)

WHAT = ("train", "sample", "forward", "data", "encode", "samplers")
ONLY_FOR = {
    "peer": ("sample", "forward", "encode"),
    "profile": ("train", "sample"),
    "weights": ("samplers",),
    "data": ("samplers",),
    "features": ("samplers",),
    "reference": ("samplers",),
    "plot": ("samplers",),
}


@processes.together()
def main(what: str) -> None:
    from dit_jax.errors import InputError

    if what not in WHAT:
        raise InputError(f"{what!r}: expected one of {', '.join(WHAT)}")
    for flag, parts in ONLY_FOR.items():
        if flags.FLAGS[flag].value and what not in parts:
            raise InputError(f"--{flag} goes with {' and '.join(parts)}, not with {what}")
    config = CONFIG.value
    if config is None and what not in ("encode", "samplers"):
        raise InputError(f"benchmark {what} needs --config")
    if what == "samplers" and not (WEIGHTS.value and DATA.value):
        raise InputError("benchmark samplers needs --weights and --data")
    if bool(FEATURES.value) != bool(REFERENCE.value):
        raise InputError("--features and --reference go together")

    from dit_jax.benchmarks import parts, rates, samplers
    from dit_jax.files import write_json

    rows = {
        "train": lambda: parts.train(config, REPEATS.value, PROFILE.value),
        "sample": lambda: parts.sample(config, REPEATS.value, PROFILE.value, PEER.value),
        "forward": lambda: parts.forward(config, REPEATS.value, PEER.value),
        "data": lambda: parts.data(config, REPEATS.value),
        "encode": lambda: parts.encode(AUTOENCODER.value, IMAGE_SIZE.value, BATCH.value, REPEATS.value, PEER.value),
        "samplers": lambda: samplers.compare(WEIGHTS.value, DATA.value, COUNT.value, FEATURES.value, REFERENCE.value),
    }[what]()
    if not processes.is_first():
        return
    print(rates.table(rows))
    if JSON.value:
        write_json(JSON.value, rows)
    if PLOT.value:
        samplers.plot(rows, PLOT.value)


if __name__ == "__main__":
    cli.run(main, arguments=("WHAT",))
