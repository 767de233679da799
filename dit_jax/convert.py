"""Convert weights between formats, or move a training run between PyTorch and here.

SOURCE is a .pt (flat, or a training checkpoint), a .safetensors, a folder of diffusers, a training run, a folder that
this command made, or a name that dit_jax.download has fetched. DESTINATION is a .pt, a .safetensors, diffusers:FOLDER,
or else a folder of Orbax arrays. A training checkpoint made into a folder, and a run made into a .pt, move whole, with
their optimiser, unless --weights asks for one of their two sets of weights.

Examples:
  python -m dit_jax.convert DiT-XL-2-256x256.pt weights/xl
  python -m dit_jax.convert runs/mine mine.safetensors --weights=ema
  python -m dit_jax.convert weights/xl diffusers:pipeline
  python -m dit_jax.convert 0050000.pt runs/moved
"""

from absl import flags

from dit_jax import cli

WEIGHTS = flags.DEFINE_enum("weights", None, ["ema", "model"], "Of a source that has both. Default: ema.")
NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Default: the paper's for this depth and width.", lower_bound=1)
NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "As many as label rows: no null class.", lower_bound=1)
INPUT_SIZE = flags.DEFINE_integer("input_size", None, "Where there is no pos_embed.", lower_bound=1)


def main(source: str, destination: str) -> None:
    import dataclasses
    from pathlib import Path

    import jax
    from tqdm import tqdm

    from dit_jax.checkpoints import files, torch_layout
    from dit_jax.files import digest
    from dit_jax.training import torch_run

    jax.config.update("jax_platforms", "cpu")  # a training may have the others, and a TPU pod starts on all hosts only
    given = {"num_heads": NUM_HEADS.value, "num_classes": NUM_CLASSES.value, "input_size": INPUT_SIZE.value}
    known = {name: value for name, value in given.items() if value is not None}
    path, written = files.find(source), files.format_of(destination)
    if WEIGHTS.value is None and written == "pytorch" and files.is_run(path):
        step = torch_run.export_run(path, Path(destination))
        print(f"wrote {destination}: model, ema and opt of {path} at step {step}; --weights=ema writes ema alone")
    elif WEIGHTS.value is None and written == "orbax" and torch_run.is_torch_run(path):
        step = torch_run.import_run(path, destination, **known)
        print(f"wrote {destination}: a run at step {step} that resumes {path}; --weights=ema writes ema alone")
    else:
        weights = files.open_weights(path, WEIGHTS.value, **known)
        files.require(weights, known)
        record = dataclasses.replace(weights.record, source=path.name, sha256=digest(weights.path))
        with tqdm(desc=f"to {destination}", total=len(torch_layout.table(record.model)), unit="parameter") as bar:
            files.write_weights(destination, record, counted(weights.leaves, bar), weights.vae)
        print(f"wrote {destination}: {weights.origin}, {torch_layout.describe(record.model)}; sha256 {record.sha256}")
        if weights.vae and written in ("pytorch", "safetensors"):
            print(f"left behind, since the file has no room for it: the autoencoder {weights.vae}")


def counted(leaves, bar):
    """The same, the bar moving; unlike tqdm's own iterator it lets go of one parameter before it asks for the next."""
    for path, leaf in leaves:
        yield path, leaf
        del leaf
        bar.update()


if __name__ == "__main__":
    cli.run(main, arguments=("SOURCE", "DESTINATION"))
