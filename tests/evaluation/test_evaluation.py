"""From files of pictures to figures: what is read, what features come of it, what is said of them."""

import zipfile
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from goldens.seeded import seeded_weights
from PIL import Image
from safetensors.numpy import save_file

from dit_jax.checkpoints.inception_layout import AXES, their_name
from dit_jax.data.sources import open_source
from dit_jax.errors import InputError
from dit_jax.evaluation import classifier
from dit_jax.evaluation.classifier import held_out, read_classifier, train_classifier, write_classifier
from dit_jax.evaluation.comparison import NAMES, caveats, compare
from dit_jax.evaluation.features import Extractor, open_network, summarise
from dit_jax.evaluation.images import open_array, open_pictures
from dit_jax.evaluation.reference import measure, open_reference, write_reference
from dit_jax.models.inception import abstract_inception
from dit_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def digits():
    return open_source("digits")


@pytest.fixture(scope="module")
def network(tmp_path_factory, digits):
    """A classifier after a tenth of its training."""
    path = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 60)
        config, params, accuracy = train_classifier(digits, 8)
    assert accuracy > 0.8
    write_classifier(path, config, params, {"data": "digits", "held_out_accuracy": accuracy})
    return open_network(f"classifier:{path}")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    _, abstract = abstract_inception()
    leaves = flatten_dict(abstract)
    shapes = {their_name(path): tuple(leaf.shape[axis] for axis in AXES[leaf.ndim]) for path, leaf in leaves.items()}
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(seeded_weights(shapes), path)
    return open_network(str(path))


def colours(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def first_features(outputs: dict) -> dict:
    return {name: array[:, :64] for name, array in outputs.items()}


def all_features(extract: Extractor, images: np.ndarray) -> np.ndarray:
    return np.concatenate([outputs["pool"] for outputs in extract(images, "images")])


def test_arrays_stay_on_disk_unless_compressed(tmp_path):
    images = colours(6)
    np.savez(tmp_path / "stored.npz", labels=np.arange(6), arr_0=images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images)
    assert isinstance(open_array(tmp_path / "stored.npz", "arr_0"), np.memmap)
    for name in ("stored", "packed"):
        assert np.array_equal(open_pictures(tmp_path / f"{name}.npz").images, images)


def test_a_folder_is_read_in_order_with_what_is_recorded_beside(tmp_path):
    images = colours(12)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:06d}-3.png")
    (tmp_path / "settings.json").write_text('{"steps": 50}')
    pictures = open_pictures(tmp_path)
    assert pictures.images.shape == images.shape and np.array_equal(pictures.images[3:9], images[3:9])
    assert pictures.settings == {"steps": 50}


@pytest.mark.parametrize(
    ("told", "array"),
    [
        (r"holds no images: expected at least 4", np.zeros((0, 8, 8, 3), np.uint8)),
        (r"holds 1 image: expected at least 4", np.zeros((1, 8, 8, 3), np.uint8)),
        (r"\(4, 8, 8, 3\), float32: expected", np.zeros((4, 8, 8, 3), np.float32)),
        (r"\(4, 3, 8, 8\), uint8: expected", np.zeros((4, 3, 8, 8), np.uint8)),
        (r"\(4, 8, 8\), uint8: expected", np.zeros((4, 8, 8), np.uint8)),
    ],
)
def test_what_is_no_set_of_pictures_is_refused(tmp_path, told, array):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(InputError, match=told):
        open_pictures(tmp_path / "a.npz")


def test_damaged_and_empty_sets_are_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", arr_0=colours(6))
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:900])
    with pytest.raises(InputError, match=r"half\.npz is not a whole \.npz file"):
        open_pictures(tmp_path / "half.npz")
    np.savez(tmp_path / "other.npz", images=colours(6))
    with pytest.raises(InputError, match="lacks the array arr_0; it holds images"):
        open_pictures(tmp_path / "other.npz")
    with pytest.raises(InputError, match="there is no file or folder"):
        open_pictures(tmp_path / "none.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no images"):
        open_pictures(tmp_path / "empty")


@pytest.mark.parametrize("odd", [(8, 12, 3), (12, 12)])
def test_a_folder_of_different_pictures_is_refused_by_name(tmp_path, odd):
    for i, image in enumerate(colours(5)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    Image.fromarray(np.zeros(odd, np.uint8)).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png has 12x\d+ pixels, \d channels, but .*0\.png has 12x12 pixels, 3"):
        open_pictures(tmp_path).images[:]


def test_features_are_the_same_in_any_batch_and_on_any_number_of_devices(network, digits):
    images = digits.images[:37]
    whole = all_features(Extractor(network, one_device(), 37), images)
    assert whole.shape == (37, 64)
    for mesh, batch in ((one_device(), 5), (make_mesh(), 16), (make_mesh(), 3)):
        assert np.abs(all_features(Extractor(network, mesh, batch), images) - whole).max() < 1e-5 * whole.max()


def test_a_classifier_comes_back_from_its_file_and_other_files_do_not(tmp_path, network, digits):
    config, params, known = read_classifier(network.path)
    assert (config.image_size, config.channels, config.num_classes) == (8, 1, 10) and known["data"] == "digits"
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(network.params), strict=True)
    )
    write_classifier(tmp_path / "b.safetensors", replace(config, features=32), params, known)
    with pytest.raises(InputError, match=r"b\.safetensors: the state dict is not of"):
        read_classifier(tmp_path / "b.safetensors")
    save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors is no classifier"):
        read_classifier(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"written as \.safetensors"):
        write_classifier(tmp_path / "a.pt", config, params, known)


def test_real_digits_are_near_their_reference_and_noise_is_far(tmp_path, network, digits):
    """A classifier's reference is of what it was not trained on; its figures have names of their own."""
    extract = Extractor(network, make_mesh(), 64)
    assert write_reference(tmp_path / "ref.npz", digits, 8, extract, write=True) == len(held_out(1797)) == 449
    assert {"arr_0", "mu", "sigma", "settings"} == set(np.load(tmp_path / "ref.npz"))
    reference = measure(open_reference(tmp_path / "ref.npz", network), extract)
    assert reference.has_statistics

    def figures(images: np.ndarray) -> dict[str, float]:
        return compare(summarise(extract, images, "samples"), reference, network)

    itself = figures(digits.images[held_out(1797)])
    real = figures(digits.images[:400])
    noise = figures(np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), dtype=np.uint8))
    assert itself["classifier_frechet_distance"] < 1e-6
    assert 20 * real["classifier_frechet_distance"] < noise["classifier_frechet_distance"]
    assert real["classifier_precision"] > 0.7 > 0.3 > noise["classifier_precision"]
    assert not {"fid", "precision"} & set(real) and set(real) < set(NAMES)
    assert "not FID" in caveats(50_000, reference, network)[0]


def test_inceptions_figures_of_a_set_against_itself(tmp_path, inception):
    """Through a reference file with ADM's keys, a folder and an .npz. Of 64 features, to be quick."""
    inception = inception._replace(apply=lambda *args, apply=inception.apply: first_features(apply(*args)))
    for i, image in enumerate(colours(6)):
        (tmp_path / "data" / "class").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / "class" / f"{i}.png")
    extract = Extractor(inception, one_device(), 6)
    source = open_source(f"folder:{tmp_path / 'data'}")
    write_reference(tmp_path / "VIRTUAL_ours.npz", source, 12, extract, write=True)
    with np.load(tmp_path / "VIRTUAL_ours.npz") as arrays:
        shapes = {name: arrays[name].shape for name in arrays if name != "settings"}
    size = {"arr_0": (6, 12, 12, 3), "mu": (64,), "sigma": (64, 64), "mu_s": (64,), "sigma_s": (64, 64)}
    assert shapes == size
    reference = measure(open_reference(tmp_path / "VIRTUAL_ours.npz", inception), extract)
    samples = summarise(extract, open_pictures(tmp_path / "data").images, "samples")
    figures = compare(samples, reference, inception)
    assert figures["fid"] < 1e-6 and figures["sfid"] < 1e-6
    assert (figures["precision"], figures["recall"]) == (1.0, 1.0) and figures["inception_score"] >= 1
    told = caveats(6, reference, inception)
    assert "6 samples" in told[0] and "holds 6 images for precision and recall: ADM's holds 10,000" in told[1]
    assert (
        "no reference file of the ADM suite" in caveats(50_000, reference._replace(has_statistics=False), inception)[0]
    )


def test_only_whole_adm_references_of_the_adm_suite_go_without_a_caveat(inception):
    from dit_jax.evaluation.images import Pictures
    from dit_jax.evaluation.reference import Reference

    pictures = Pictures(np.zeros((10_000, 1, 1, 3), np.uint8), "a/VIRTUAL_imagenet256_labeled.npz", "", {})
    reference = Reference(pictures, {}, np.zeros((10_000, 1)), True)
    assert caveats(50_000, reference, inception) == []


def test_references_that_do_not_fit_are_refused(tmp_path, network, inception, digits):
    images = colours(5)
    np.savez(tmp_path / "some.npz", arr_0=images, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match=r"some\.npz lacks the array mu_s; it holds"):
        open_reference(tmp_path / "some.npz", inception)
    np.savez(tmp_path / "no_images.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match="lacks the array arr_0"):
        open_reference(tmp_path / "no_images.npz", inception)
    np.savez(tmp_path / "grey.npz", arr_0=digits.images[:5])
    with pytest.raises(InputError, match=r"grey\.npz holds grey pictures; .* say --features=classifier:PATH"):
        open_reference(tmp_path / "grey.npz", inception)
    np.savez(tmp_path / "colour.npz", arr_0=images)
    with pytest.raises(InputError, match=r"colour\.npz holds colour pictures; the classifier .* takes grey"):
        open_reference(tmp_path / "colour.npz", network)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 16, 16, 1), np.uint8))
    with pytest.raises(InputError, match=r"16x16 pixels; the classifier .* takes 8x8"):
        open_reference(tmp_path / "large.npz", network)
    write_reference(tmp_path / "ref.npz", digits, 8, Extractor(network, one_device(), 64), write=True)
    with pytest.raises(InputError, match="whose weights are others"):
        open_reference(tmp_path / "ref.npz", network._replace(sha256="another"))


def test_a_classifier_passes_over_statistics_of_inception(tmp_path, network, digits):
    np.savez(tmp_path / "a.npz", arr_0=digits.images[:9], mu=np.zeros(2048), sigma=np.eye(2048))
    assert not open_reference(tmp_path / "a.npz", network).gaussians
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert "mu.npy" in archive.namelist()
