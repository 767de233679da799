"""Draw pictures with a training run, a file or folder of weights, or a name that dit_jax.download has fetched.

Examples:
  python -m dit_jax.sample --weights=runs/digits --out=grid.png --labels=0,1,2 --steps=250 --guidance=4.0 --seed=0
  python -m dit_jax.sample --weights=runs/digits --out=samples.npz --count=1000
  python -m dit_jax.sample --weights=runs/digits_words --out=grid.png --prompts="three,a five" --count=20
  python -m dit_jax.sample --weights=DiT-XL-2-256x256 --autoencoder=sd-vae-ft-ema --out=xl.npz --count=50000 \\
    --labels=random --guidance=1.5

Image i depends on the weights, the settings, the seed and i, not on the batch or the number of devices and processes.
The settings are kept with the images. An .npz or a folder that was interrupted goes on with the same command.
"""

import os
import sys
import time

from absl import flags

from dit_jax import cli
from dit_jax.parallel import processes

WEIGHTS = flags.DEFINE_string("weights", None, "A run, a file or folder of weights, or a name.")
OUT = flags.DEFINE_string("out", None, "What to write: a grid (.png), arrays (.npz), or a folder of PNGs (else).")
LABELS = flags.DEFINE_list(
    "labels", ["balanced"], "balanced: all classes in turn; random: any, by chance; or class numbers, over and over."
)
PROMPTS = flags.DEFINE_list("prompts", None, "Phrases, over and over, for a model that draws from words.")
COUNT = flags.DEFINE_integer("count", None, "Images. Default: one a label or phrase.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 64, "Images drawn at once, over all devices.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise and of random labels.", lower_bound=0)
EMA = flags.DEFINE_bool("ema", True, "Averaged weights, where there are two; --ema=false takes the raw ones.")
SAMPLER = flags.DEFINE_enum(
    "sampler", None, ["ddpm", "ddim", "dpm-solver++"], "Default: as the weights' record says, like all below."
)
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; 1 is none.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "A file, folder, or fetched name that decodes latents.")
CHANNELS = flags.DEFINE_integer("guidance_channels", None, "Guided channels, from the first; 0: all.", lower_bound=0)
INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "LOW,HIGH: noise levels that are guided, sqrt(1 / abar - 1); empty: all."
)
ATTENTION = flags.DEFINE_string("attention", None, "Another schedule of attention, as config.model.attention.")
DTYPE = flags.DEFINE_string("dtype", None, "Of matrix products, as config.model.dtype.")
CLIP = flags.DEFINE_bool("clip_denoised", None, "Keep predictions within [-1, 1]; for pixels, not for latents.")
flags.adopt_module_key_flags(processes)


@processes.together(saves_when_stopped=True)
def main() -> None:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from dit_jax.checkpoints.files import open_weights
    from dit_jax.data.words import open_context
    from dit_jax.parallel.mesh import make_mesh
    from dit_jax.sampling.collection import check_destination, open_collection
    from dit_jax.sampling.generate import make_generate

    check_destination(OUT.value)
    mesh = make_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    replicated = lambda shapes: jax.tree.map(lambda _: everywhere, shapes)  # noqa: E731
    weights = open_weights(WEIGHTS.value, None if EMA.value else "model", replicated)
    weights = weights.with_model(attention=ATTENTION.value, dtype=DTYPE.value)
    record, codec = weights.record, choose_codec(AUTOENCODER.value, weights)
    words = open_context(record.context, record.class_names, record.model)
    if PROMPTS.value is not None:
        labels, prompts = choose_prompts(PROMPTS.value, COUNT.value, words, record.model.num_classes)
    else:
        labels = choose_labels(LABELS.value, COUNT.value, SEED.value, record.class_names)
        prompts = words.in_turn(labels) if words else []
    context = words.tokens(prompts) if words else ()
    settings = dict(record.sample) | given_settings()
    with jax.set_mesh(mesh):
        codec = codec._replace(params=jax.device_put(codec.params, everywhere))
        generate = make_generate(record.model, record.diffusion, codec, **settings)
        collection = None
        if processes.is_first():
            about = provenance(weights, codec, settings, len(labels))
            collection = open_collection(OUT.value, labels, record.class_names, about, prompts)
        told = ", ".join(f"{name}={value}" for name, value in settings.items())
        processes.say(f"{len(labels)} images from {weights.origin}: {told}")
        drawn = draw(generate, weights.params(replicated), (labels, *context), collection, mesh.size)
    if drawn < len(labels):
        if collection is not None:
            then = "goes on" if collection.goes_on else "begins anew, since a grid is kept whole"
            print(
                f"stopped after {drawn} of {len(labels)} images; the same command {then}", file=sys.stderr, flush=True
            )
        if processes.alone():
            os._exit(1)  # what the devices still draw would otherwise be waited for
        sys.exit(1)
    if collection is not None:
        collection.complete()
        print(f"wrote {OUT.value}")


def draw(generate, params, conditions, collection, devices: int) -> int:
    """Draw the images that the first process's collection lacks; returns how many there are now, all unless stopped.

    Several processes stop when they have drawn the same batch, one alone leaves the batch that it is at.

    conditions: labels (count,), and condition tokens and their mask for a model that takes them.
    Batches begin at multiples of their size, so that a run which goes on draws each image in the same company.
    """
    import numpy as np
    from tqdm import tqdm

    from dit_jax.sampling.generate import image_keys, in_batches

    count, first, alone = len(conditions[0]), processes.is_first(), processes.alone()
    batch = -(-min(BATCH.value, count) // devices) * devices
    padded = [in_batches(rows, batch) for rows in conditions]
    batches = range(0, count, batch)
    lacking = [str(i) for i in batches if collection.lacks(range(i, i + batch))] if first else []
    todo = [int(i) for i in processes.gather(",".join(lacking))[0].split(",") if i]
    there = count - sum(min(batch, count - i) for i in todo)
    shown = {"total": count, "initial": there, "unit": "image", "disable": not first}
    with processes.stop_signals() as stopping, tqdm(**shown) as bar:
        for step, i in enumerate(todo):
            labels, *context = (rows[i : i + batch] for rows in padded)
            images = generate(params, labels, image_keys(SEED.value, i, batch), *context)
            while not (images.is_ready() or (alone and stopping(step))):
                time.sleep(0.001)  # within `block_until_ready` no signal is heard
            if not images.is_ready():
                break
            if first:
                collection.add(i, np.asarray(images))
            bar.update(min(batch, count - i))
            there += min(batch, count - i)
            if stopping(step):
                break
    return there


def given_settings() -> dict:
    """Those of `config.sample` that were given as flags."""
    flagged = {
        "sampler": SAMPLER.value,
        "steps": STEPS.value,
        "guidance": GUIDANCE.value,
        "guidance_channels": CHANNELS.value,
        "clip_denoised": CLIP.value,
    }
    if INTERVAL.value is not None:
        flagged["guidance_interval"] = tuple(to_number(level) for level in INTERVAL.value)
    return {name: value for name, value in flagged.items() if value is not None}


def to_number(text: str) -> float:
    from dit_jax.errors import InputError

    try:
        return float(text)
    except ValueError:
        raise InputError(f"--guidance_interval: {text!r} is not a number; expected LOW,HIGH such as 0.3,3") from None


def provenance(weights, codec, settings: dict, count: int) -> dict:
    """All that decides what the images are, to be kept with them."""
    import jax

    from dit_jax import __version__
    from dit_jax.files import digest

    record = weights.record
    return {
        "weights": {"sha256": digest(weights.path), "kind": record.weights, "step": record.step},
        "autoencoder": codec.about(),
        "count": count,
        **({"labels": ",".join(LABELS.value)} if PROMPTS.value is None else {"prompts": ",".join(PROMPTS.value)}),
        "seed": SEED.value,
        **settings,
        "diffusion": record.diffusion,
        "dtype": record.model.here.dtype,
        "attention": record.model.attention,
        "attention_kernel": record.model.here.attention_kernel,
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "platform": jax.default_backend(),
        "dit_jax": __version__,
    }


def choose_codec(given: str | None, weights):
    """What makes pictures: the autoencoder that was given, that came with the weights, or that they were trained with.

    Raises InputError if the network draws latents and there is none.
    """
    from dit_jax.checkpoints.codec import IDENTITY, open_codec, reopen_codec
    from dit_jax.errors import InputError

    known = weights.record.autoencoder
    if given or weights.vae:
        return open_codec(given or str(weights.vae))
    if known:
        return reopen_codec(known, "--autoencoder")
    if weights.record.model.in_channels in (1, 3):
        return IDENTITY
    raise InputError(
        f"{weights.path} draws latents of {weights.record.model.in_channels} channels, and nothing tells which "
        "autoencoder makes pictures of them: give --autoencoder, which for the released models is sd-vae-ft-ema"
    )


def choose_labels(given: list[str], count: int | None, seed: int, class_names: list[str]):
    """(count,) int32 labels: those given or all classes, over and over, or random ones.

    Raises InputError for one out of range.
    """
    import numpy as np

    from dit_jax.errors import InputError
    from dit_jax.sampling.generate import random_labels

    classes = len(class_names)
    if given == ["random"]:
        return np.asarray(random_labels(seed, count or classes, classes))
    if given == ["balanced"]:
        given = [str(label) for label in range(classes)]
    wrong = [label for label in given if not (label.isdecimal() and int(label) < classes)]
    if wrong or not given:
        raise InputError(
            f"label {','.join(wrong)!r}: this model has {classes} classes, 0 to {classes - 1}; --labels takes numbers "
            "of classes, balanced or random"
        )
    labels = np.array([int(label) for label in given], dtype=np.int32)
    return np.resize(labels, count or len(labels))


def choose_prompts(given: list[str], count: int | None, words, classes: int):
    """(count,) int32 labels, each of the class that a phrase names, -1 for none; and the phrases, over and over.

    Raises InputError for what the model cannot read.
    """
    import numpy as np

    from dit_jax.errors import InputError

    if words is None:
        raise InputError("--prompts: this model does not draw from words; use --labels")
    if LABELS.present:
        raise InputError("--labels and --prompts say the same twice: give one of them")
    given = given or [""]
    words.tokens(given)
    labels = np.array([words.class_of(phrase) for phrase in given], np.int32)
    if classes > 1 and (labels < 0).any():
        raise InputError(
            f"prompt {given[labels.argmin()]!r}: this model takes a label too, and this names not one of its classes, "
            f"which are {', '.join(words.nouns)}"
        )
    count = count or len(given)
    return np.resize(labels, count), [given[i % len(given)] for i in range(count)]


if __name__ == "__main__":
    flags.mark_flags_as_required(["weights", "out"])
    cli.run(main)
