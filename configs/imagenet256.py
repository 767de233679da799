"""DiT on ImageNet at 256 pixels, as released (Peebles & Xie 2023): any of the twelve presets.

python -m dit_jax.download sd-vae-ft-ema
python -m dit_jax.encode --data=folder:IMAGENET/train --autoencoder=sd-vae-ft-ema --out=data/imagenet256
python -m dit_jax.train --config=configs/imagenet256.py:DiT-XL/2 --workdir=runs/xl256

Where a chip does not hold 16 bytes a parameter beside its activations, add --config.mesh.fsdp=8.

A step of XL/2 is 182 TFLOP. Estimated from published bfloat16 peaks at 50% of them, seconds a step on 8 chips:
v4 0.17, v5e 0.23, v5p 0.10, v6e 0.05, A100 0.15, H100 0.05; on n chips 8/n of that.

From the literature. Loss: XL/2 0.17 to 0.18 after 2,500 steps of 128 images; S/8 0.19 after 5,000 steps and 0.17 after
100,000; B/2 0.15 after 400,000. FID-50K without guidance after 400,000 steps: S/2 68.4, B/2 43.5, L/2 23.3, XL/2 19.5;
of XL/2 after 7M steps with guidance 1.5: 2.27.
"""

import dataclasses

from dit_jax.config import DiTConfig, base_config


def get_config(preset="DiT-XL/2"):
    c = base_config()
    c.steps = 7_000_000
    c.model.update(dataclasses.asdict(DiTConfig.preset(preset, input_size=32)))
    c.data.source = "latents:data/imagenet256"
    c.data.threads = 4  # moments need no decoding, and more threads than this wait for each other
    c.checkpoint.update(every=10_000, keep_every=100_000)
    c.preview.every = 50_000
    return c
