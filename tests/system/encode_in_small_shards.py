"""The encode command with small shards."""

from dit_jax import cli, encode
from dit_jax.data import latents

latents.SHARD_BYTES = 2**14

if __name__ == "__main__":
    cli.run(encode.main)
