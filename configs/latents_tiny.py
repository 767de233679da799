"""The whole path of latents in miniature: photographs, an autoencoder, cached latents, training, decoded samples.

bash launch/latents_tiny.sh

It makes the photographs (crops of scikit-learn's two), and an autoencoder with random weights: what it draws are no
pictures, but every part is the real one. A minute on two cores.
"""

from dit_jax.config import base_config


def get_config():
    c = base_config()
    c.steps = 200
    c.batch_size = 16
    c.ema_decay = 0.99
    c.data.source = "latents:runs/latents_tiny/latents"
    c.model.update(input_size=8, patch_size=2, in_channels=4, num_classes=2, hidden_size=96, depth=4, num_heads=3)
    c.optimizer.learning_rate = 5e-4
    c.log_every = 20
    c.checkpoint.every = 100
    c.preview.update(every=100, count=8)
    c.sample.update(steps=50, guidance=1.5)
    return c
