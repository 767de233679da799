"""Handwritten digits of 8x8 pixels, from scikit-learn: the quick-start.

python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits

Three and a half minutes on two cores. 99.8% of 1,000 digits drawn at guidance 2 show the class asked for, 94.4% without
guidance, by a classifier that is right on 99.1% of real ones; without guidance they are as varied as real ones (0.93).
"""

from dit_jax.config import base_config


def get_config():
    c = base_config()
    c.steps = 3_000
    c.batch_size = 64
    c.ema_decay = 0.995
    c.data.source = "digits"
    c.data.flip = False
    c.data.threads = 1
    c.diffusion.schedule = "squaredcos_cap_v2"  # the linear one drowns so few pixels in noise too soon
    c.model.update(input_size=8, patch_size=2, in_channels=1, num_classes=10, hidden_size=96, depth=4, num_heads=3)
    c.optimizer.learning_rate = 1e-3
    c.optimizer.decay = "cosine"
    c.checkpoint.every = 1_000
    c.preview.every = 500
    c.preview.count = 40
    c.sample.update(sampler="ddpm", steps=50, guidance=2.0, clip_denoised=True)
    return c
