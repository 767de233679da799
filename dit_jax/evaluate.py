"""Measure samples against a reference: FID, sFID, Inception Score, precision and recall, as the ADM suite does.

Samples are an .npz of dit_jax.sample or a folder of pictures; a reference is an .npz of the ADM suite or of
--make_reference, or pictures too. For small data sets features can come from a classifier instead of Inception. Flags
may be spelled with hyphens: --make-reference.

Examples:
  python -m dit_jax.evaluate --samples=a.npz --reference=VIRTUAL_imagenet256_labeled.npz --inception=inception-fid
  python -m dit_jax.evaluate --make_reference=b.npz --data=folder:photos --image_size=256 --inception=inception-fid
  python -m dit_jax.evaluate --make_classifier=digits.safetensors --data=digits
  python -m dit_jax.evaluate --make_reference=b.npz --data=digits --features=classifier:digits.safetensors
  python -m dit_jax.evaluate --samples=a.npz --reference=b.npz --features=classifier:digits.safetensors --json=a.json
"""

import sys
from pathlib import Path

from absl import flags

from dit_jax import cli
from dit_jax.errors import InputError
from dit_jax.parallel import processes

SAMPLES = flags.DEFINE_string("samples", None, "What to measure: an .npz, or a folder of pictures.")
REFERENCE = flags.DEFINE_string("reference", None, "What to measure it against: an .npz, or a folder of pictures.")
INCEPTION = flags.DEFINE_string("inception", None, "A file of Inception's weights, or inception-fid once fetched.")
FEATURES = flags.DEFINE_string("features", None, "In place of --inception: classifier:PATH.")
JSON = flags.DEFINE_string("json", None, "Where to write the figures and all settings.")
BATCH = flags.DEFINE_integer("batch", 64, "Pictures computed at once, over all devices.", lower_bound=1)
MAKE_REFERENCE = flags.DEFINE_string("make_reference", None, "Reference file (.npz) to make of --data.")
MAKE_CLASSIFIER = flags.DEFINE_string("make_classifier", None, "Classifier (.safetensors) to train on --data.")
DATA = flags.DEFINE_string("data", None, "A data set, as in config.data.source.")
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side that its images are cropped to, pixels; digits and mnist have one.", lower_bound=1
)
for name in ("make_reference", "make_classifier", "image_size"):
    flags.DEFINE_alias(name.replace("_", "-"), name)
flags.adopt_module_key_flags(processes)


@processes.together()
def main() -> None:
    actions = [(SAMPLES, REFERENCE, evaluate), (MAKE_REFERENCE, DATA, make_reference)]
    actions.append((MAKE_CLASSIFIER, DATA, make_classifier))
    chosen = [action for action in actions if action[0].value]
    if len(chosen) != 1:
        raise InputError("expected one of --samples, --make_reference and --make_classifier; see --help")
    flag, needed, act = chosen[0]
    if not needed.value:
        raise InputError(f"--{flag.name} needs --{needed.name}; see --help")
    act()


def evaluate() -> None:
    import jax

    from dit_jax import __version__
    from dit_jax.evaluation.comparison import NAMES, PRECISION, caveats, compare
    from dit_jax.evaluation.features import Extractor, summarise
    from dit_jax.evaluation.images import open_pictures
    from dit_jax.evaluation.reference import measure, open_reference
    from dit_jax.files import make_folder, write_json
    from dit_jax.parallel.mesh import make_mesh

    network, samples = open_features(), open_pictures(SAMPLES.value)
    network.require(samples.images.shape[1:], samples.path)
    opened = open_reference(REFERENCE.value, network)
    if samples.images.shape[1:] != opened.pictures.images.shape[1:]:
        shapes = " and ".join(
            "x".join(map(str, each.images.shape[1:])) + f" in {each.path}" for each in (samples, opened.pictures)
        )
        raise InputError(f"pictures of {shapes} cannot be compared: expected one size")
    if JSON.value:
        make_folder(Path(JSON.value).parent)
    mesh = make_mesh()
    extract = Extractor(network, mesh, BATCH.value)
    with jax.set_mesh(mesh):
        reference = measure(opened, extract)
        summary = summarise(extract, samples.images, samples.path)
        figures = compare(summary, reference, network)
    if not processes.is_first():
        return
    found = caveats(summary.count, reference, network)
    for name, value in figures.items():
        print(f"{NAMES[name]:<40} {value:12.6g}")
    for line in found:
        print(f"not comparable with published values: {line}", file=sys.stderr)
    if JSON.value:
        report = {
            "metrics": figures,
            "caveats": found,
            "features": network.about(),
            "samples": samples.about(),
            "reference": reference.about(),
            "computed": PRECISION[network.kind] | {"batch": BATCH.value, "devices": mesh.size, "k": 3, "split": 5000},
            "versions": {"dit_jax": __version__, "jax": jax.__version__, "platform": jax.default_backend()},
        }
        write_json(JSON.value, report)
        print(f"wrote {JSON.value}")


def make_reference() -> None:
    from dit_jax.data.sources import open_source
    from dit_jax.evaluation.features import Extractor
    from dit_jax.evaluation.reference import write_reference
    from dit_jax.parallel.mesh import make_mesh

    if not MAKE_REFERENCE.value.endswith(".npz"):
        raise InputError(f"--make_reference={MAKE_REFERENCE.value}: expected a name that ends in .npz")
    network, source = open_features(), open_source(DATA.value)
    size = network.size[0] if network.size and not IMAGE_SIZE.value else choose_size(source)
    network.require((size, size, source.channels), DATA.value)
    extract = Extractor(network, make_mesh(), BATCH.value)
    count = write_reference(MAKE_REFERENCE.value, source, size, extract, write=processes.is_first())
    unseen = f" that {network.path} was not trained on" if count < len(source) else ""
    processes.say(f"wrote {MAKE_REFERENCE.value}: {count:,} of {len(source):,} images of {DATA.value}{unseen}")


def make_classifier() -> None:
    from dit_jax.data.sources import open_source
    from dit_jax.evaluation.classifier import HELD_OUT, train_classifier, write_classifier

    source = open_source(DATA.value)
    size = choose_size(source)
    config, params, accuracy = train_classifier(source, size)
    known = {
        "data": repr(source),
        "held_out_accuracy": accuracy,
        "held_out": f"every {HELD_OUT}th image",
    }
    if processes.is_first():
        write_classifier(MAKE_CLASSIFIER.value, config, params, known)
    processes.say(f"wrote {MAKE_CLASSIFIER.value}: right on {accuracy:.1%} of the images held out of {DATA.value}")


def open_features():
    """The network that the flags name. Raises InputError unless they name one."""
    from dit_jax.evaluation.features import CLASSIFIER, open_network

    if bool(INCEPTION.value) == bool(FEATURES.value):
        raise InputError("expected either --inception=FILE or --features=classifier:PATH")
    if FEATURES.value and not FEATURES.value.startswith(CLASSIFIER):
        raise InputError(f"--features={FEATURES.value}: expected classifier:PATH; Inception is given by --inception")
    return open_network(FEATURES.value or INCEPTION.value)


def choose_size(source) -> int:
    """The side to crop images to: as told, or that of images that all have one."""
    from dit_jax.data.sources import ArraySource

    if IMAGE_SIZE.value:
        return IMAGE_SIZE.value
    if isinstance(source, ArraySource):
        return source.images.shape[1]
    raise InputError(f"{source!r} has images of any size: say --image_size, in pixels")


if __name__ == "__main__":
    cli.run(main)
