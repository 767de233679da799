"""Handwritten digits of 8x8 pixels, drawn from words: "three", "a five". The model sees no labels.

python -m dit_jax.train --config=configs/digits_words.py --workdir=runs/digits_words
python -m dit_jax.sample --weights=runs/digits_words --out=words.png --prompts="three,a five,draw a seven" --count=30
python -m dit_jax.sample --weights=runs/digits_words --out=words.npz --count=1000
python -m dit_jax.judge --samples=words.npz --data=digits --out=judgement.json

Fourteen minutes on two busy cores. 99.8% of 1,000 digits drawn at guidance 2 from the phrases of training show what
they name, 91.9% without guidance (spread 0.78 and 0.94); of 500 from phrases that it never saw, "digit three", 99.8%.
The classifier is right on 99.1% of real digits.
"""

from dit_jax.config import base_config
from dit_jax.data.words import ALPHABET


def get_config():
    c = base_config()
    c.steps = 3_000
    c.batch_size = 64
    c.ema_decay = 0.995
    c.context = "words"
    c.data.source = "digits"
    c.data.flip = False
    c.data.threads = 1
    c.diffusion.schedule = "squaredcos_cap_v2"
    c.model.update(input_size=8, patch_size=2, in_channels=1, num_classes=1, hidden_size=96, depth=4, num_heads=3)
    c.model.update(context_features=len(ALPHABET), context_tokens=16)
    c.optimizer.learning_rate = 1e-3
    c.optimizer.decay = "cosine"
    c.checkpoint.every = 1_000
    c.preview.every = 500
    c.preview.count = 40
    c.sample.update(sampler="ddpm", steps=50, guidance=2.0, clip_denoised=True)
    return c
