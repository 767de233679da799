"""DiT on ImageNet at 512 pixels, as released (Peebles & Xie 2023).

python -m dit_jax.download sd-vae-ft-ema
python -m dit_jax.encode --data=folder:IMAGENET/train --image_size=512 --out=data/imagenet512 \\
    --autoencoder=sd-vae-ft-ema
python -m dit_jax.train --config=configs/imagenet512.py:DiT-XL/2 --workdir=runs/xl512

Where a chip does not hold 16 bytes a parameter beside its activations, add --config.mesh.fsdp=8, and where it does not
hold the activations --config.model.remat=full.

A step of XL/2 is 806 TFLOP. Estimated from published bfloat16 peaks at 50% of them, seconds a step on 8 chips:
v4 0.73, v5e 1.02, v5p 0.44, v6e 0.22, A100 0.65, H100 0.20; on n chips 8/n of that.

From the literature: FID-50K of XL/2 after 3M steps with guidance 1.5 is 3.04.
"""

import dataclasses

from dit_jax.config import DiTConfig, base_config


def get_config(preset="DiT-XL/2"):
    c = base_config()
    c.steps = 3_000_000
    c.model.update(dataclasses.asdict(DiTConfig.preset(preset, input_size=64)))
    c.data.source = "latents:data/imagenet512"
    c.data.threads = 4  # moments need no decoding, and more threads than this wait for each other
    c.checkpoint.update(every=10_000, keep_every=100_000)
    c.preview.every = 50_000
    return c
