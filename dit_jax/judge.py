"""Judge generated images with a classifier of real ones: do they show the class that was asked for?

For data sets small enough for scikit-learn, such as digits and mnist. The result is printed and written as JSON.

Example:
  python -m dit_jax.sample --weights=runs/digits --out=samples.npz --count=1000
  python -m dit_jax.judge --samples=samples.npz --data=digits --out=judgement.json
"""

from absl import flags

from dit_jax import cli

SAMPLES = flags.DEFINE_string("samples", None, "The .npz of dit_jax.sample, with its labels.")
DATA = flags.DEFINE_string("data", None, "The real images: what config.data.source was.")
OUT = flags.DEFINE_string("out", None, "The JSON to write.")


def main() -> None:
    from dit_jax.data.sources import open_source
    from dit_jax.errors import InputError
    from dit_jax.evaluation.agreement import judge
    from dit_jax.evaluation.images import labelled_images
    from dit_jax.files import read_npz, write_json

    arrays = read_npz(SAMPLES.value, ("arr_0", "labels"))
    samples, labels = arrays["arr_0"], arrays["labels"]
    if (labels < 0).any():
        raise InputError(f"{SAMPLES.value} holds pictures of prompts that name no class, which nobody can judge")
    source = open_source(DATA.value)
    judgement = judge(samples, labels, *labelled_images(source, samples.shape[1]), source.class_names)
    write_json(OUT.value, judgement)
    print(
        f"{SAMPLES.value}: {judgement['agreement']:.1%} of {judgement['samples']} images show the class asked for; "
        f"the classifier is right on {judgement['classifier_accuracy']:.1%} of held-out real ones; "
        f"spread within a class {judgement['spread_ratio']:.2f} of the real one"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["samples", "data", "out"])
    cli.run(main)
