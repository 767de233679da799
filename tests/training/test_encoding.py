"""Images to a data set of moments: those of the autoencoder, whatever the devices, the batch and the broken files."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from goldens.cases import seeded_autoencoder
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from dit_jax import AutoencoderConfig
from dit_jax.checkpoints.autoencoder_layout import save_autoencoder
from dit_jax.checkpoints.codec import IDENTITY, Codec, open_codec
from dit_jax.data import latents
from dit_jax.data.latents import LatentSource, LatentWriter
from dit_jax.data.loader import Records
from dit_jax.data.sources import CorruptImageError, open_source
from dit_jax.data.transforms import normalise
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import abstract_autoencoder
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training.encoding import encode_shards, make_encode, moments_shape

SIZE, PHOTOS = 16, 11
TINY = dict(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)
CONFIGS = {
    4: AutoencoderConfig(**TINY),
    16: AutoencoderConfig(**TINY, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eleven crops of scikit-learn's two photographs, no two alike and none its own mirror image."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(PHOTOS):
        label, photo = index % 2, load_sample_images().images[index % 2]
        (folder / str(label)).mkdir(exist_ok=True)
        crop = Image.fromarray(photo).crop((40 * index, 20 * index, 40 * index + 64, 20 * index + 64))
        crop.resize((SIZE, SIZE)).save(folder / str(label) / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def codecs(tmp_path_factory) -> dict[int, Codec]:
    """Autoencoders of 4 and of 16 latent channels, from their files."""
    folder, opened = tmp_path_factory.mktemp("autoencoders"), {}
    for channels, config in CONFIGS.items():
        path = folder / f"{channels}.safetensors"
        save_autoencoder(seeded_autoencoder(config), path)
        opened[channels] = open_codec(str(path))
    return opened


@pytest.fixture(scope="module")
def codec(codecs) -> Codec:
    return codecs[4]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory, photos, codec):
    return encoded(tmp_path_factory.mktemp("data") / "latents", photos, codec)


def encoded(
    folder: Path, photos: Path, codec: Codec, *, dtype="float32", devices=1, batch=4, skip_corrupt=False
) -> tuple[list[np.ndarray], list[int], int]:
    """(moments, labels, how many were left out) of a data set made of the photographs."""
    source = open_source(f"folder:{photos}")
    settings = {
        "autoencoder": codec.about(),
        "shape": moments_shape(codec, SIZE, source.channels),
        "dtype": dtype,
        "class_names": source.class_names,
    }
    writer = LatentWriter(folder, len(source), settings)
    mesh, records = make_mesh(devices=jax.devices()[:devices]), Records(source, SIZE, skip_corrupt)
    with tqdm(disable=True) as bar:
        account = encode_shards(writer, range(len(writer)), records, codec, mesh, batch * devices, 2, bar)
    writer.complete()
    read = LatentSource(folder)
    return [read[i]["moments"] for i in range(len(read))], [read[i]["label"] for i in range(len(read))], account.skipped


def expected(photos: Path, codec: Codec) -> np.ndarray:
    """(N, 2, h, w, 2C) by the autoencoder as it is, one image at a time."""
    graph, _ = abstract_autoencoder(codec.config)
    moments = jax.jit(nnx.merge(graph, codec.params).moments)
    images = [normalise(np.asarray(Image.open(path)))[None] for path in sorted(photos.rglob("*.png"))]
    return np.stack([np.concatenate([moments(x), moments(x[:, :, ::-1])]) for x in images])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("channels", CONFIGS)
def test_records_are_the_moments_of_each_image_and_of_its_mirror_image(tmp_path, photos, codecs, channels, devices):
    codec = codecs[channels]
    wanted = expected(photos, codec)
    assert wanted.shape == (PHOTOS, 2, SIZE // 2, SIZE // 2, 2 * channels)
    moments, labels, skipped = encoded(tmp_path / "latents", photos, codec, devices=devices, batch=1)
    np.testing.assert_allclose(moments, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(wanted[:, 0] - wanted[:, 1]).max() > 0.1
    assert labels == [0] * 6 + [1] * 5 and not skipped


def test_half_precision_rounds_and_does_nothing_else(tmp_path, photos, codec, data_set):
    exact, _, _ = data_set
    rounded, _, _ = encoded(tmp_path / "latents", photos, codec, dtype="float16")
    assert rounded[0].dtype == np.float16
    np.testing.assert_array_equal(rounded, np.float16(exact))


def test_shards_hold_the_records_of_one_in_their_order(tmp_path, photos, codec, data_set, monkeypatch):
    one, labels, _ = data_set
    monkeypatch.setattr(latents, "SHARD_BYTES", 4 * one[0].nbytes)
    several, same, _ = encoded(tmp_path / "several", photos, codec)
    assert len(list((tmp_path / "several").glob("*-of-00003"))) == 3
    # Another place in the batch may round another way.
    np.testing.assert_allclose(several, one, atol=1e-6 * np.abs(one).max())
    assert same == labels


@pytest.mark.parametrize("batch", [PHOTOS, 16])
def test_the_batch_changes_nothing_whether_it_is_padded_or_not(tmp_path, photos, codec, data_set, batch):
    padded, labels, _ = data_set
    moments, same, _ = encoded(tmp_path / "latents", photos, codec, batch=batch)
    assert labels == same
    np.testing.assert_allclose(moments, padded, atol=1e-5 * np.abs(padded).max())


def test_padding_is_bit_exact(codec):
    encode = make_encode(codec, np.dtype("float32"), make_mesh(devices=jax.devices()[:1]))
    x = np.random.default_rng(0).uniform(-1, 1, (4, SIZE, SIZE, 3)).astype(np.float32)
    zeros = np.concatenate([x[:2], np.zeros_like(x[:2])])
    np.testing.assert_array_equal(encode(x)[:2], encode(zeros)[:2])


def test_every_device_encodes_its_own_images(codec):
    encode = make_encode(codec, np.dtype("float32"), make_mesh())
    moments = encode(np.zeros((16, SIZE, SIZE, 3), np.float32))
    assert {shard.data.shape[0] for shard in moments.addressable_shards} == {2}


def test_without_an_autoencoder_moments_are_pixels_and_no_variance(tmp_path, photos):
    moments, _, _ = encoded(tmp_path / "latents", photos, IDENTITY, dtype="float16")
    x = np.stack([normalise(np.asarray(Image.open(path))) for path in sorted(photos.rglob("*.png"))])
    np.testing.assert_array_equal(np.array(moments)[..., :3], np.float16(np.stack([x, x[:, :, ::-1]], axis=1)))
    assert (np.array(moments)[..., 3:] == -30).all()


@pytest.fixture
def with_broken(tmp_path, photos) -> Path:
    """The photographs, and broken ones before, among and after them."""
    folder = tmp_path / "photos"
    for path in photos.rglob("*.png"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    for name in ("0/-1.png", "0/03.png", "1/98.png", "1/99.png"):
        (folder / name).write_bytes(next(photos.rglob("*.png")).read_bytes()[:100])
    return folder


def test_unreadable_images_are_left_out_and_counted(tmp_path, photos, with_broken, monkeypatch):
    monkeypatch.setattr(latents, "SHARD_BYTES", 4 * 2 * SIZE * SIZE * 6 * 4)
    moments, labels, skipped = encoded(tmp_path / "latents", with_broken, IDENTITY, skip_corrupt=True)
    whole, same, _ = encoded(tmp_path / "whole", photos, IDENTITY)
    assert skipped == 4 and labels == same
    np.testing.assert_array_equal(moments, whole)


def test_an_unreadable_image_stops_the_work_with_its_name_and_leaves_no_half_shard(tmp_path, with_broken):
    with pytest.raises(CorruptImageError, match=r"0/-1\.png cannot be decoded"):
        encoded(tmp_path / "latents", with_broken, IDENTITY)
    left = {path.name for path in (tmp_path / "latents").rglob("*") if path.is_file()}
    assert left == {"settings.json"}


def test_an_image_size_that_the_autoencoder_does_not_take_is_refused(codec):
    with pytest.raises(InputError, match="multiples of 2"):
        moments_shape(codec, 15, 3)
    with pytest.raises(InputError, match=r"expects \(batch, height, width, 3\)"):
        moments_shape(codec, 16, 1)
