"""The programs of training, sampling and encoding, lowered from a config for any mesh; nothing is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dit_jax.checkpoints.codec import IDENTITY, Codec
from dit_jax.config import DiTConfig
from dit_jax.errors import InputError
from dit_jax.models.autoencoder import AutoencoderConfig, abstract_autoencoder
from dit_jax.models.dit import abstract_dit
from dit_jax.parallel.sharding import batch_sharding, require_shards
from dit_jax.sampling.generate import make_program
from dit_jax.training.encoding import make_encode_program
from dit_jax.training.inputs import choose_and_draw, encode_and_draw
from dit_jax.training.state import abstract_state
from dit_jax.training.step import as_read, make_train_step


def resolve(what: str, config: ConfigDict, device: jax.Device) -> None:
    """Settle what `auto` and, in training, `unroll=0` mean in config.model on the devices that the program is for."""
    model = DiTConfig(**config.model).resolved(device)
    config.model.update(dtype=model.dtype, attention_kernel=model.attention_kernel, remat=model.remat)
    if what == "train":
        config.model.unroll = model.unroll


def lower(what: str, config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """train: the whole step. sample: `config.batch_size` pictures, decoded. encode: as many images to moments."""
    if what not in PROGRAMS:
        raise InputError(f"what={what!r}: expected one of {', '.join(PROGRAMS)}")
    require_shards(config.batch_size, config.accumulate if what == "train" else 1, mesh)
    with jax.set_mesh(mesh):
        return PROGRAMS[what](config, mesh)


def lower_train(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    rows, model = batch_sharding(mesh), DiTConfig(**config.model)
    B, S, C = config.batch_size, model.input_size, model.in_channels
    codec, prepare, frozen = codec_of(config), as_read, {}
    x = jax.ShapeDtypeStruct((B, S, S, C), jnp.float32, sharding=rows)
    if config.latents == "on_the_fly":
        prepare, frozen = encode_and_draw(codec), replicated(codec.params, mesh)
        side = S * codec.downsample
        x = jax.ShapeDtypeStruct((B, side, side, codec.config.in_channels), jnp.float32, sharding=rows)
    elif codec.config:
        prepare = choose_and_draw(codec.about(), config.data.flip)
        x = jax.ShapeDtypeStruct((B, 2, S, S, 2 * C), jnp.float16, sharding=rows)
    batch = {"x": x, "y": jax.ShapeDtypeStruct((B,), jnp.int32, sharding=rows)} | context_of(model, B, rows)
    return make_train_step(config, mesh, prepare).lower(abstract_state(config, mesh), batch, frozen)


def lower_sample(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    model, codec = DiTConfig(**config.model), codec_of(config)
    generate = make_program(model, config.diffusion, codec, **config.sample)
    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), config.batch_size))
    params, context = replicated(abstract_dit(model)[1], mesh), context_of(model, config.batch_size)
    return generate.lower(params, replicated(codec.params, mesh), labels, keys, **context)


def lower_encode(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    codec = codec_of(config)
    if codec.config is None:
        raise InputError("this config trains on pixels: there is nothing to encode")
    side = config.model.input_size * codec.downsample
    shape = (config.batch_size, side, side, codec.config.in_channels)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
    return make_encode_program(codec, np.dtype(np.float16), mesh).lower(replicated(codec.params, mesh), x)


PROGRAMS = {"train": lower_train, "sample": lower_sample, "encode": lower_encode}


def context_of(model: DiTConfig, count: int, sharding: NamedSharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Condition tokens and their mask for so many images; nothing if the model takes none."""
    if not model.context_features:
        return {}
    L, F = model.context_tokens, model.context_features
    return {
        "context": jax.ShapeDtypeStruct((count, L, F), jnp.float32, sharding=sharding),
        "context_mask": jax.ShapeDtypeStruct((count, L), bool, sharding=sharding),
    }


def codec_of(config: ConfigDict) -> Codec:
    """What the config's latents come from, without its weights: Stable Diffusion's autoencoder, or none for pixels."""
    if not (config.latents or config.data.source.startswith("latents:")):
        return IDENTITY
    autoencoder = dataclasses.replace(AutoencoderConfig(), latent_channels=config.model.in_channels)
    return Codec("abstract", "", autoencoder, abstract_autoencoder(autoencoder)[1])


def replicated(tree, mesh: Mesh):
    """Shapes with their sharding: whole on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree)
