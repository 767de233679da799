"""Images for networks of latents: read from a data set of moments, or encoded by the autoencoder at hand."""

import jax
import numpy as np
from flax import nnx
from goldens.seeded import seeded_array

from dit_jax import AutoencoderConfig, DiTConfig
from dit_jax.checkpoints.codec import Codec
from dit_jax.checkpoints.record import Record
from dit_jax.data.latents import LatentSource, LatentWriter
from dit_jax.data.sources import open_source
from dit_jax.data.transforms import normalise
from dit_jax.inspection.images import from_source
from dit_jax.models.autoencoder import abstract_autoencoder

RECORD = Record.of(
    DiTConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=10)
)


def test_latents_are_the_scaled_means_of_the_images_as_they_are(tmp_path):
    moments = np.random.default_rng(0).standard_normal((6, 2, 4, 4, 8)).astype("float16")
    about = {"name": "tiny", "sha256": "5a" * 32, "scaling_factor": 0.5, "shift_factor": 0.25}
    settings = {"autoencoder": about, "shape": (2, 4, 4, 8), "dtype": "float16", "class_names": ["a", "b"]}
    writer = LatentWriter(tmp_path, 6, settings | {"source": "none", "image_size": 8})
    writer.write(0, [(each, i % 2) for i, each in enumerate(moments)])
    writer.complete()
    images = from_source(LatentSource(tmp_path), RECORD, None, 6, None)
    order = np.random.default_rng(0).permutation(6)
    expected = (moments[order, 0, ..., :4].astype(np.float32) - 0.25) * 0.5
    np.testing.assert_allclose(images.x0, expected, atol=1e-6)
    assert images.labels.tolist() == (order % 2).tolist() and images.segments is None


def test_images_are_encoded_to_the_mean_of_their_posterior():
    config = AutoencoderConfig(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1)
    graph, shapes = abstract_autoencoder(config)
    fill = lambda at, leaf: seeded_array(jax.tree_util.keystr(at), leaf.shape, leaf.size**-0.25)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(fill, shapes)
    codec = Codec("tiny", "", config, params)
    source = open_source("synthetic:8:3")
    images = from_source(source, RECORD, codec, 2, None)
    first = int(np.random.default_rng(0).permutation(3)[0])
    moments = jax.jit(lambda x: nnx.merge(graph, params).moments(x))(normalise(source[first]["image"])[None])
    mean = np.asarray(moments)[..., :4]
    expected = (mean - config.shift_factor) * config.scaling_factor
    assert images.x0.shape == (2, 4, 4, 4) and np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(images.x0[0], expected[0], atol=1e-4 * np.abs(expected).max())
