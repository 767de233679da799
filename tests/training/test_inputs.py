"""What a step trains on: the same distribution from cached moments and from images that are encoded in the step."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from goldens.seeded import seeded_array
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from dit_jax import AutoencoderConfig
from dit_jax.checkpoints.autoencoder_layout import save_autoencoder
from dit_jax.checkpoints.codec import IDENTITY, Codec, open_codec
from dit_jax.checkpoints.files import open_weights
from dit_jax.config import DiTConfig, base_config
from dit_jax.data.latents import LatentSource, LatentWriter
from dit_jax.data.loader import Records
from dit_jax.data.sources import open_source
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import abstract_autoencoder
from dit_jax.models.dit import abstract_dit
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training import step
from dit_jax.training.encoding import encode_shards, moments_shape
from dit_jax.training.inputs import open_inputs
from dit_jax.training.loop import make_loader, train
from dit_jax.training.state import TrainState, init_state

IMAGES, SIZE, SCALE, SHIFT = 4, 16, 0.7, 0.3
COPIES = 16  # of each image, for Grain shuffles a handful of records slowly
TINY = AutoencoderConfig(
    block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, scaling_factor=SCALE, shift_factor=SHIFT
)


def save_seeded(path: Path, seed: str, config: AutoencoderConfig = TINY) -> None:
    graph, shapes = abstract_autoencoder(config)
    fill = lambda at, leaf: seeded_array(seed + jax.tree_util.keystr(at), leaf.shape, leaf.size**-0.25)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(fill, shapes)
    params["quant_conv"]["bias"][4:] = [-7, -6, -5, -4]  # log-variances: images and mirror images are far apart
    save_autoencoder(nnx.merge(graph, params), path)


class Made(NamedTuple):
    """Where a user would have put them."""

    photos: Path
    autoencoder: Path
    latents: Path


def encode(made: Made, codec: Codec) -> None:
    source = open_source(f"folder:{made.photos}")
    settings = {
        "autoencoder": codec.about(),
        "shape": moments_shape(codec, SIZE, source.channels),
        "dtype": "float32",
        "class_names": source.class_names,
    }
    writer, mesh = LatentWriter(made.latents, len(source), settings), make_mesh(devices=jax.devices()[:1])
    with tqdm(disable=True) as bar:
        encode_shards(writer, range(len(writer)), Records(source, SIZE, False), codec, mesh, COPIES, 2, bar)
    writer.complete()


def make(folder: Path) -> Made:
    """Four photographs, each over and over in a class of its own, an autoencoder and their moments."""
    made = Made(folder / "photos", folder / "tiny.safetensors", folder / "latents")
    for index in range(IMAGES):
        (made.photos / str(index)).mkdir(parents=True)
        crop = Image.fromarray(load_sample_images().images[index % 2]).crop((150 * index, 0, 150 * index + 128, 128))
        for copy in range(COPIES):
            crop.resize((SIZE, SIZE)).save(made.photos / str(index) / f"{copy}.png")
    save_seeded(made.autoencoder, "a")
    encode(made, open_codec(str(made.autoencoder)))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def moments(made) -> np.ndarray:
    """(4, 2, 8, 8, 8) of each image, which is its label, and of its mirror image."""
    source = LatentSource(made.latents)
    return np.stack([source[image * COPIES]["moments"] for image in range(IMAGES)])


def config_of(made: Made, kind: str, **changes) -> ConfigDict:
    config = base_config()
    config.batch_size = 16
    config.steps = 4
    config.data.threads = 2
    config.model.update(input_size=8, in_channels=4, num_classes=IMAGES, hidden_size=16, depth=1, num_heads=2)
    config.optimizer.learning_rate = 1e-3
    config.log_every = 1
    config.preview.update(every=0, count=2)
    config.sample.update(sampler="ddim", steps=2)
    if kind == "cached":
        config.data.source = f"latents:{made.latents}"
    else:
        config.data.source = f"folder:{made.photos}"
        config.update(latents="on_the_fly", autoencoder=str(made.autoencoder))
    config.update_from_flattened_dict(changes)
    return config


KINDS = ["cached", "on_the_fly"]


class Seen(NamedTuple):
    """What each step trained on."""

    x0: np.ndarray  # (steps, B, 8, 8, 4)
    labels: np.ndarray  # (steps, B)


def steps(config: ConfigDict, devices: int = 1) -> tuple[list[dict], TrainState, dict]:
    """(batches and metrics of each step, state, frozen weights) of the steps of a run."""
    mesh, source = make_mesh(config.mesh, jax.devices()[:devices]), open_source(config.data.source)
    inputs = open_inputs(config, source)
    told = []
    with jax.set_mesh(mesh), make_loader(config, source, inputs, mesh).batches(0) as batches:
        state, train_step = init_state(config, mesh), step.make_train_step(config, mesh, inputs.prepare)
        for _ in range(config.steps):
            batch = next(batches)
            state, metrics = train_step(state, batch, inputs.frozen)
            told.append(jax.tree.map(np.asarray, metrics | {"labels": batch["y"]}))
    return told, state, inputs.frozen


def seen(config: ConfigDict, devices: int = 1) -> Seen:
    """The steps as they are, but for the last part: instead of learning from an example it shows it."""

    def make_shower(*_):
        return lambda state, examples: (state.replace(step=state.step + 1), {"x0": examples.x})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_update", make_shower)
        told, _, _ = steps(config, devices)
    return Seen(*(np.stack([one[name] for one in told]) for name in ("x0", "labels")))


@pytest.fixture(scope="module", params=KINDS)
def draws(request, made) -> Seen:
    """36 epochs: 576 draws of each image, about half of them mirrored."""
    return seen(config_of(made, request.param, steps=6, batch_size=384))


@pytest.fixture(scope="module", params=KINDS)
def run(request, made, tmp_path_factory) -> tuple[Path, ConfigDict]:
    """A run on eight devices, and its config."""
    workdir = tmp_path_factory.mktemp("run")
    config = config_of(made, request.param, **{"preview.every": 4})
    assert train(config, workdir) == 4
    return workdir, config


@pytest.fixture(scope="module")
def on_one_device(run) -> tuple[list[dict], TrainState, dict]:
    """The steps of that run on one device."""
    _, config = run
    return steps(config)


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def by_image(draws: Seen, moments: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(draws as standard scores (n, 8, 8, 4), flipped (n,), standard deviations) of each image.

    A draw is of the mirror image if it is the likelier of the two.
    """
    x0, labels = np.concatenate(draws.x0).astype(np.float64), np.concatenate(draws.labels)
    parts = []
    for image in range(IMAGES):
        mean, log_variance = np.split(moments[image].astype(np.float64), 2, axis=-1)
        deviation = np.exp(log_variance / 2)
        scores = ((x0[labels == image] / SCALE + SHIFT)[:, None] - mean) / deviation
        surprise = (scores**2 / 2 + np.log(deviation)).sum((2, 3, 4))
        flipped = surprise[:, 1] < surprise[:, 0]
        parts.append((scores[np.arange(len(scores)), flipped.astype(int)], flipped, deviation))
    return parts


def test_every_image_is_drawn_and_half_of_the_draws_are_mirrored(draws, moments):
    flips = [flipped for _, flipped, _ in by_image(draws, moments)]
    assert [len(flipped) for flipped in flips] == [576] * IMAGES
    for flipped in flips:  # within 4 standard deviations
        assert abs(flipped.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(flipped))


def test_draws_have_the_means_and_variances_of_the_posterior_scaled_and_shifted(draws, moments):
    deviations = np.concatenate([deviation.ravel() for _, _, deviation in by_image(draws, moments)])
    assert deviations.max() > 5 * deviations.min(), "variances that a mistake in them would show in"
    for scores, flipped, _ in by_image(draws, moments):
        for chosen in (scores[flipped], scores[~flipped]):
            n, places = len(chosen), chosen[0].size
            # Each of 256 places within 5 standard deviations, and all together within 5.
            assert np.abs(chosen.mean(0)).max() < 5 / np.sqrt(n)
            assert np.abs(chosen.var(0) - 1).max() < 5 * np.sqrt(2 / n)
            assert abs(chosen.mean()) < 5 / np.sqrt(n * places)
            assert abs(chosen.var() - 1) < 5 * np.sqrt(2 / (n * places))


def test_noise_is_independent_between_rows_and_steps(draws, moments):
    for scores, _, _ in by_image(draws, moments):
        rows = scores.reshape(len(scores), -1)
        correlations = (rows @ rows.T / rows.shape[1])[~np.eye(len(rows), dtype=bool)]
        # 166,000 pairs: the largest of so many standard scores is about 4.5; that of a repeated draw is 16.
        assert np.abs(correlations).max() < 7 / np.sqrt(rows.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_sees_other_draws(made, kind):
    first, other = (seen(config_of(made, kind, steps=1, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(first.labels, other.labels)
    assert np.abs(first.x0 - other.x0).mean() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_without_flip_no_draw_is_mirrored(made, moments, kind):
    plain = seen(config_of(made, kind, steps=1, batch_size=384, **{"data.flip": False}))
    assert not any(flipped.any() for _, flipped, _ in by_image(plain, moments))


def test_latents_of_half_precision_are_drawn_in_single(made):
    inputs = open_inputs(config_of(made, "cached"), LatentSource(made.latents))
    moments = np.zeros((2, 2, 8, 8, 8), np.float16)
    x0 = inputs.prepare({}, jax.random.key(0), moments)
    assert x0.dtype == np.float32 and len(np.unique(x0)) > 500


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_sees_does_not_depend_on_the_mesh(made, kind):
    one, eight = (seen(config_of(made, kind), devices) for devices in (1, 8))
    np.testing.assert_allclose(eight.x0, one.x0, atol=1e-5)


def test_a_run_on_eight_devices_has_the_losses_and_weights_of_one_device(run, on_one_device):
    workdir, _ = run
    told, state, _ = on_one_device
    np.testing.assert_allclose([one["loss"] for one in told], losses(workdir), rtol=1e-5)
    params = open_weights(workdir, "model").params()
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_run_previews_pixels_and_knows_its_autoencoder(run, made):
    workdir, _ = run
    assert Image.open(workdir / "previews" / "0000004.png").mode == "RGB"
    assert open_weights(workdir).record.autoencoder == open_codec(str(made.autoencoder)).about()


def test_the_autoencoder_is_frozen_and_no_parameter_of_the_run(run, on_one_device, made):
    _, config = run
    _, state, frozen = on_one_device
    untouched = open_codec(str(made.autoencoder)).params if config.latents else {}
    assert jax.tree.structure(frozen) == jax.tree.structure(untouched)
    jax.tree.map(np.testing.assert_array_equal, frozen, untouched)
    _, shapes = abstract_dit(DiTConfig(**config.model))
    shapes_of = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
    assert shapes_of(state.params) == shapes_of(state.ema) == shapes_of(shapes)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.opt_state) <= 2 * size(shapes) + 2, "the moments of the DiT's gradient, and counts"


def test_pixels_need_no_autoencoder_and_pass_as_they_are(made):
    config = config_of(made, "cached", **{"data.source": f"folder:{made.photos}", "model.in_channels": 3})
    inputs = open_inputs(config, open_source(config.data.source))
    x = seeded_array("x", (2, 8, 8, 3))
    assert inputs.prepare(inputs.frozen, jax.random.key(0), x) is x
    assert (inputs.shape, inputs.image_size, inputs.flip, inputs.codec) == ((8, 8, 3), 8, True, IDENTITY)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("cached", {"latents": "on_the_fly"}, "holds latents, and latents='on_the_fly' encodes images: choose one"),
        ("cached", {"latents": "cached"}, "latents='cached': expected on_the_fly, or nothing"),
        ("cached", {"model.in_channels": 3}, "gives 4 channels, the model takes 3: set --config.model.in_channels=4"),
        ("cached", {"model.input_size": 16}, "gives 8x8, the model takes 16x16: set --config.model.input_size=8"),
        ("cached", {"model.num_classes": 10}, "set --config.model.num_classes=4"),
        ("cached", {"data.source": "latents:/nowhere"}, "/nowhere is not a data set of latents"),
        ("on_the_fly", {"autoencoder": ""}, "needs config.autoencoder"),
        ("on_the_fly", {"autoencoder": "/nowhere"}, "nothing of that name: /nowhere"),
        ("on_the_fly", {"model.in_channels": 3}, "gives 4 channels, the model takes 3"),
        ("on_the_fly", {"data.source": "digits", "model.num_classes": 10}, r"expects \(batch, height, width, 3\)"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path, made, kind, changes, told):
    with pytest.raises(InputError, match=told) as caught:
        train(config_of(made, kind, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_cached_latents_train_without_their_autoencoder_but_are_previewed_by_no_other(tmp_path):
    made = make(tmp_path)
    source, sha256 = LatentSource(made.latents), open_codec(str(made.autoencoder)).sha256
    made.autoencoder.rename(tmp_path / "moved.safetensors")
    assert train(config_of(made, "cached", steps=1), tmp_path / "run") == 1
    previewing = config_of(made, "cached", **{"preview.every": 4})
    with pytest.raises(InputError, match=r"tiny.safetensors.*; or say --config.autoencoder"):
        open_inputs(previewing, source)
    save_seeded(made.autoencoder, "b")
    with pytest.raises(InputError, match=r"is not the autoencoder that made these latents: say --config.autoencoder"):
        open_inputs(previewing, source)
    previewing.autoencoder = str(tmp_path / "moved.safetensors")
    assert open_inputs(previewing, source).codec.sha256 == sha256
