"""Draw pictures with a training run, a file or folder of weights, or a name that dit_jax.download has fetched.

Examples:
  python -m dit_jax.sample --weights=runs/digits --out=grid.png --labels=0,1,2 --steps=250 --guidance=4.0 --seed=0
  python -m dit_jax.sample --weights=runs/digits --out=samples.npz --count=1000

Image i depends on the weights, the seed and i, not on the batch or the number of devices and processes.
"""

from absl import flags

from dit_jax import cli
from dit_jax.parallel import processes

WEIGHTS = flags.DEFINE_string("weights", None, "A run, a file or folder of weights, or a name.")
OUT = flags.DEFINE_string("out", None, "What to write: a grid (.png), arrays (.npz), or a folder of PNGs (else).")
LABELS = flags.DEFINE_list("labels", None, "Class numbers, over and over up to --count. Default: every class in turn.")
COUNT = flags.DEFINE_integer("count", None, "Images. Default: one a label.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 64, "Images drawn at once, over all devices.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
EMA = flags.DEFINE_bool("ema", True, "Averaged weights, where there are two; --ema=false takes the raw ones.")
SAMPLER = flags.DEFINE_enum("sampler", None, ["ddpm", "ddim"], "Default: as the weights' record says, like all below.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps.", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; 1 is none.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "A file, folder, or fetched name that decodes latents.")
CHANNELS = flags.DEFINE_integer("guidance_channels", None, "Guided channels, from the first; 0: all.", lower_bound=0)
CLIP = flags.DEFINE_bool("clip_denoised", None, "Keep predictions within [-1, 1]; for pixels, not for latents.")
flags.adopt_module_key_flags(processes)


@processes.together()
def main() -> None:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from tqdm import tqdm

    from dit_jax.checkpoints.files import open_weights
    from dit_jax.parallel.mesh import make_mesh
    from dit_jax.sampling.generate import image_keys, make_generate
    from dit_jax.sampling.pictures import check_destination, save_pictures

    check_destination(OUT.value)
    mesh = make_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    replicated = lambda shapes: jax.tree.map(lambda _: everywhere, shapes)  # noqa: E731
    weights = open_weights(WEIGHTS.value, None if EMA.value else "model", replicated)
    record, params = weights.record, weights.params(replicated)
    codec = choose_codec(AUTOENCODER.value, weights)
    codec = codec._replace(params=jax.device_put(codec.params, everywhere))
    labels = choose_labels(LABELS.value, COUNT.value, record.class_names)
    flagged = {
        "sampler": SAMPLER.value,
        "steps": STEPS.value,
        "guidance": GUIDANCE.value,
        "guidance_channels": CHANNELS.value,
        "clip_denoised": CLIP.value,
    }
    settings = dict(record.sample) | {name: value for name, value in flagged.items() if value is not None}
    processes.say(f"{len(labels)} images from {weights.origin}: " + ", ".join(f"{k}={v}" for k, v in settings.items()))

    batch = -(-min(BATCH.value, len(labels)) // mesh.size) * mesh.size
    padded = np.resize(labels, -(-len(labels) // batch) * batch)
    with jax.set_mesh(mesh):
        generate = make_generate(record.model, record.diffusion, codec, **settings)
        images = []
        for i in tqdm(range(0, len(padded), batch), unit="batch", disable=not processes.is_first()):
            drawn = generate(params, padded[i : i + batch], image_keys(SEED.value, i, batch)).block_until_ready()
            if processes.is_first():
                images.append(np.asarray(drawn))
    if processes.is_first():
        save_pictures(OUT.value, np.concatenate(images)[: len(labels)], labels, record.class_names)
        print(f"wrote {OUT.value}")


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


def choose_labels(given: list[str] | None, count: int | None, class_names: list[str]):
    """(count,) int32 labels: those given, or all classes, over and over. Raises InputError for one out of range."""
    import numpy as np

    from dit_jax.errors import InputError

    classes = len(class_names)
    wrong = [label for label in given or [] if not (label.isdecimal() and int(label) < classes)]
    if wrong:
        raise InputError(f"label {wrong[0]!r}: this model has {classes} classes, 0 to {classes - 1}")
    labels = np.array([int(label) for label in given] if given else range(classes), dtype=np.int32)
    return np.resize(labels, count or len(labels))


if __name__ == "__main__":
    flags.mark_flags_as_required(["weights", "out"])
    cli.run(main)
