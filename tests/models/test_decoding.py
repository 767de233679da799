"""Pictures of latents: whole, a few at a time, shared by devices and in tiles, in bounded memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens.cases import TINY_AUTOENCODER, relative_error, seeded_autoencoder
from goldens.seeded import seeded_array

from dit_jax import AutoencoderKL
from dit_jax.models.autoencoder import from_latents
from dit_jax.models.decoding import blending, decode_pixels, decode_tiled
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.sharding import batch_sharding


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    return seeded_autoencoder(TINY_AUTOENCODER)


def temporary_bytes(function, *shapes: tuple[int, ...]) -> int:
    """Memory of the compiled function beside its inputs and outputs."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*structs).compile().memory_analysis().temp_size_in_bytes


def test_pictures_of_latents_undo_scale_and_shift(tiny):
    graph, state = nnx.split(tiny)
    vae = nnx.merge(graph, state)
    vae.config = dataclasses.replace(TINY_AUTOENCODER, scaling_factor=0.5, shift_factor=3.0)
    z = seeded_array("z", (2, 4, 6, 4))
    assert (
        relative_error(jax.jit(lambda z: decode_pixels(vae, z))((z - 3.0) * 0.5), np.asarray(jax.jit(tiny.decode)(z)))
        < 1e-5
    )


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8])
def test_micro_batches_change_no_image(tiny, micro_batch):
    z = jnp.asarray(seeded_array("z", (5, 4, 4, 4)))
    whole = jax.jit(tiny.decode)(from_latents(z, TINY_AUTOENCODER.scaling_factor, TINY_AUTOENCODER.shift_factor))
    assert relative_error(jax.jit(decode_pixels, static_argnums=2)(tiny, z, micro_batch), np.asarray(whole)) < 2e-6


def test_memory_does_not_grow_with_the_number_of_images(tiny):
    def beside_images(count: int) -> int:
        images = count * 64 * 64 * 3 * 4
        return temporary_bytes(lambda z: decode_pixels(tiny, z, 2), (count, 32, 32, 4)) - images

    assert beside_images(64) < 1.1 * beside_images(4)
    assert beside_images(64) < 0.2 * temporary_bytes(tiny.decode, (64, 32, 32, 4))


def test_devices_of_a_mesh_decode_their_own_images(tiny):
    mesh = make_mesh()
    z = jnp.asarray(seeded_array("z", (32, 4, 4, 4)))
    with jax.set_mesh(mesh):
        shared = jax.device_put(z, batch_sharding(mesh))
        program = jax.jit(lambda z: decode_pixels(tiny, z, 16)).lower(shared).compile()
        images = program(shared)
    assert images.sharding.is_equivalent_to(batch_sharding(mesh), images.ndim)
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in program.as_text()]
    assert relative_error(images, np.asarray(decode_pixels(tiny, z))) < 2e-6


def test_an_image_of_one_tile_is_decoded_exactly(tiny):
    z = jnp.asarray(seeded_array("z", (1, 16, 12, 4)))
    assert np.array_equal(jax.jit(lambda z: decode_tiled(tiny, z, tile=32))(z), jax.jit(tiny.decode)(z))


@pytest.mark.parametrize("size", [(40, 12), (28, 45)])
def test_tiles_make_nearly_the_image_of_one_piece(tiny, size):
    z = jnp.asarray(seeded_array("z", (1, *size, 4)))
    tiled, whole = jax.jit(lambda z: decode_tiled(tiny, z, tile=32))(z), np.asarray(jax.jit(tiny.decode)(z))
    assert tiled.shape == whole.shape
    assert np.sqrt(np.square(tiled - whole).mean()) < 0.2 * whole.std()  # a tile in the wrong place: 1.4


@pytest.mark.parametrize(("length", "tile"), [(64, 64), (65, 64), (112, 64), (128, 64), (1000, 64), (7, 1), (9, 3)])
def test_tiles_cover_a_side_and_their_weights_sum_to_one(length, tile):
    starts, weights = blending(length, tile, 4)
    total = np.zeros(length * 4)
    for start, row in zip(starts, weights, strict=True):
        total[start * 4 :][: tile * 4] += row
    assert (starts[0], starts[-1]) == (0, length - tile)
    assert np.allclose(total, 1)
    assert np.diff(starts, append=starts[-1]).max() <= tile - tile // 4  # they overlap by a quarter


def test_two_tiles_fade_into_each_other_linearly():
    _, (first, second) = blending(28, 16, 2)  # the last 8 pixels of 32 are the first 8 of the next
    assert np.allclose(second[:8], (np.arange(8) + 0.5) / 8)
    assert np.allclose(first[-8:], second[:8][::-1])
    assert (first[:-8] == 1).all() and (second[8:] == 1).all()


def test_memory_does_not_grow_with_the_size_of_an_image(tiny):
    def beside_image(side: int) -> int:
        return temporary_bytes(lambda z: decode_tiled(tiny, z, tile=64), (1, side, side, 4)) - side**2 * 4 * 3 * 4

    assert beside_image(256) < 1.5 * beside_image(64)
