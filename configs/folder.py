"""Your own photographs, in pixels: a folder with one sub-folder a class.

  python -m dit_jax.train --config=configs/folder.py --workdir=runs/mine \\
      --config.data.source=folder:PATH --config.model.num_classes=NUMBER_OF_FOLDERS

32x32 pixels and the width of DiT-S; 8.5 GFLOP an image in training. More pixels: --config.model.input_size=64.
"""

from dit_jax.config import base_config


def get_config():
    c = base_config()
    c.steps = 100_000
    c.batch_size = 64
    c.ema_decay = 0.999
    c.diffusion.schedule = "squaredcos_cap_v2"
    c.model.update(input_size=32, patch_size=4, in_channels=3, hidden_size=384, depth=12, num_heads=6)
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 500
    c.checkpoint.every = 2_000
    c.preview.every = 2_000
    c.sample.update(steps=100, guidance=2.0, guidance_channels=0, clip_denoised=True)
    return c
