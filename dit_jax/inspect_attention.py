"""See what attention does: where each patch looks, what every head is for, and what the condition lets through.

Writes a folder: index.html (one page, no network needed), report.json (all numbers) and PNGs.

Examples:
  python -m dit_jax.inspect_attention --weights=runs/digits --out=report
  python -m dit_jax.inspect_attention --weights=DiT-XL-2-512x512 --data=generated:20 --count=8 \\
    --timesteps=100,500,900 --ablate=0 --out=report
  python -m dit_jax.inspect_attention --weights=runs/gated --out=report --prune=smaller.safetensors

Without --data the images are those that the run was trained on, or else drawn by the network. --prune needs weights
with head gates; it cuts the heads out whose gates were 0 at these timesteps and at 21 from first to last, and refuses
if that changes an output.
"""

import sys
import time

from absl import flags

from dit_jax import cli
from dit_jax.parallel import processes

WEIGHTS = flags.DEFINE_string("weights", None, "A run, a file or folder of weights, or a name.")
OUT = flags.DEFINE_string("out", None, "Folder to make.")
DATA = flags.DEFINE_string("data", None, "A data set, as in config.data.source, or generated[:STEPS].")
COUNT = flags.DEFINE_integer("count", 32, "Images.", lower_bound=1)
TIMESTEPS = flags.DEFINE_list("timesteps", ["50", "250", "500", "750", "950"], "Of training; 0 is the least noisy.")
LABELS = flags.DEFINE_list("labels", None, "Numbers of classes to take. Default: any.")
ABLATE = flags.DEFINE_integer(
    "ablate", 64, "Images, others than these, that each head is removed on; 0 removes none.", lower_bound=0
)
EMA = flags.DEFINE_bool("ema", True, "Averaged weights, where there are two; --ema=false takes the raw ones.")
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "A file, folder, or fetched name; where weights name none.")
PRUNE = flags.DEFINE_string("prune", None, "Where to write the weights without the heads that stayed shut.")


def main() -> None:
    from flax import nnx
    from tqdm import tqdm

    from dit_jax.checkpoints.files import find, open_weights
    from dit_jax.diffusion.gaussian import GaussianDiffusion
    from dit_jax.files import replacing_folder
    from dit_jax.inspection.ablation import head_importance
    from dit_jax.inspection.conditions import measure_modulations, widest_condition_gates
    from dit_jax.inspection.images import choose
    from dit_jax.inspection.measure import measure
    from dit_jax.inspection.notes import about_ablation, about_measures
    from dit_jax.inspection.prune import require_prunable, require_same, shut_heads
    from dit_jax.inspection.report import make_report, write_report
    from dit_jax.models.dit import abstract_dit

    processes.require_alone()
    started, count = time.monotonic(), COUNT.value
    weights = open_weights(WEIGHTS.value, None if EMA.value else "model")
    record, codec = weights.record, choose_codec(weights)
    config, diffusion = record.model, GaussianDiffusion.create(**record.diffusion)
    timesteps = whole_numbers(TIMESTEPS, diffusion.num_steps)
    labels = whole_numbers(LABELS, config.num_classes) if LABELS.value is not None else None
    if PRUNE.value:
        require_prunable(config)
    with replacing_folder(OUT.value) as folder:
        graph, _ = abstract_dit(config)
        params = weights.params()
        model = nnx.merge(graph, params)
        trained_on = data_of_run(find(WEIGHTS.value))
        chosen = choose(DATA.value, trained_on, model, record, codec, count + ABLATE.value, labels)
        images, others = chosen.images.part(slice(count)), chosen.images.part(slice(count, None))
        print(f"{count} images at {len(timesteps)} timesteps. {chosen.origin}")
        passes = count * len(timesteps) * (2 if config.class_dropout_prob else 1)
        with tqdm(desc="watching", total=passes, unit="pass") as bar:
            found = measure(model, diffusion, images, timesteps, bar.update)
        if config.head_gate == "condition":
            found = found._replace(widest_gate=widest_condition_gates(model, diffusion.steps))
        importance, passes = None, ABLATE.value * len(timesteps) * (1 + sum(config.block_heads))
        if passes:
            with tqdm(desc="removing heads", total=passes, unit="pass") as bar:
                importance = head_importance(model, diffusion, others, timesteps, bar.update)
        evenly = [*range(0, diffusion.num_steps, -(-diffusion.num_steps // 20)), diffusion.num_steps - 1]
        modulations = measure_modulations(model, evenly, images.labels)
        about = {
            "weights": weights.origin,
            "data": chosen.origin,
            "ablation": about_ablation(ABLATE.value, chosen.novelty),
            "notes": about_measures(config, images.segments is not None),
            "steps": diffusion.num_steps,
        }
        report = make_report(record, images, found, modulations, importance, about)
        write_report(folder, report, images, found, lambda x: show(x, codec))
    print(f"wrote {OUT.value}/index.html, report.json and figures in {time.monotonic() - started:.0f} s")
    say_roles(report)
    if PRUNE.value:
        shut = (found.widest_gate == 0) & shut_heads(model, diffusion, images, evenly)
        difference_of = lambda smaller: require_same(model, smaller, diffusion, images, evenly)  # noqa: E731
        prune(weights, params, shut, difference_of)


def choose_codec(weights):
    """What is between images and the network; None for latents of an autoencoder that is not here."""
    from dit_jax.checkpoints.codec import IDENTITY, open_codec, reopen_codec
    from dit_jax.errors import InputError

    known = weights.record.autoencoder
    if AUTOENCODER.value or weights.vae:
        return open_codec(AUTOENCODER.value or str(weights.vae))
    if known:
        try:
            return reopen_codec(known, "--autoencoder")
        except InputError as error:
            print(f"latents are shown as they are: {error}", file=sys.stderr)
            return None
    return IDENTITY if weights.record.model.in_channels in (1, 3) else None


def data_of_run(path) -> str:
    """The data set that the run at `path` was trained on, or ""."""
    from dit_jax.checkpoints.files import is_run
    from dit_jax.files import read_json

    config = path / "config.json"
    return read_json(config)["data"]["source"] if path.is_dir() and is_run(path) and config.exists() else ""


def show(x, codec):
    """(B, S, S, C) -> (B, H, W, 1 or 3) uint8; of latents that nothing decodes three channels, in their own range."""
    import jax
    import numpy as np

    from dit_jax.sampling.generate import to_uint8

    if codec is not None:
        return np.concatenate(
            [jax.jit(codec.decode, static_argnums=2)(codec.params, some[None], to_uint8) for some in x]
        )
    shown = x[..., :3]
    low, high = (f(shown, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    return (255 * (shown - low) / np.maximum(high - low, 1e-9)).astype(np.uint8)


def whole_numbers(flag, end: int) -> list[int]:
    """The numbers of a list flag. Raises InputError unless each is in [0, end)."""
    from dit_jax.errors import InputError

    wrong = [text for text in flag.value if not (text.strip().isdecimal() and int(text) < end)]
    if wrong or not flag.value:
        raise InputError(f"--{flag.name}={','.join(flag.value)}: expected whole numbers from 0 to {end - 1}")
    return [int(text) for text in flag.value]


def say_roles(report: dict) -> None:
    """One line: how many heads have each role, with their label and over all timesteps."""
    from dit_jax.inspection.roles import CUT

    heads = [role for layer in report["roles"][0][0] for role in layer if role != CUT]
    told = ", ".join(f"{heads.count(role)} {role}" for role, _ in report["rules"] if role in heads)
    print(f"roles of {len(heads)} heads: {told}")


def prune(weights, params: dict, shut, difference_of) -> None:
    """Write the weights without the heads whose gates were 0 throughout, once the outputs are found to be the same."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx
    from flax.traverse_util import flatten_dict

    from dit_jax.checkpoints.files import write_weights
    from dit_jax.files import digest
    from dit_jax.inspection.prune import cut_heads
    from dit_jax.models.dit import abstract_dit

    record = weights.record
    config, smaller = cut_heads(record.model, params, shut)
    graph, _ = abstract_dit(config)
    difference = difference_of(nnx.merge(graph, jax.tree.map(jnp.asarray, smaller)))
    known = dict(model=config, source=weights.path.name, sha256=digest(weights.path))
    write_weights(PRUNE.value, dataclasses.replace(record, **known), flatten_dict(smaller, sep="/").items())
    left, before = (", ".join(map(str, network.block_heads)) for network in (config, record.model))
    print(f"wrote {PRUNE.value}: the blocks have {left} heads and had {before}")
    print(f"outputs in float32 differ by {difference:.1g} at most, over these images at 21 timesteps")


if __name__ == "__main__":
    flags.mark_flags_as_required(["weights", "out"])
    cli.run(main)
