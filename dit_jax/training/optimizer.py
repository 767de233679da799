"""AdamW and its learning rate, from the configuration."""

import optax
from ml_collections import ConfigDict

from dit_jax.errors import InputError


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Step -> learning rate: linear warm-up from 0, then constant or a cosine to 0 at the run's last step."""
    c = config.optimizer
    if c.decay == "constant":
        after = optax.constant_schedule(c.learning_rate)
    elif c.decay == "cosine":
        after = optax.cosine_decay_schedule(c.learning_rate, max(config.steps - c.warmup_steps, 1))
    else:
        raise InputError(f"optimizer.decay={c.decay!r}: expected constant or cosine")
    if not c.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps)
    return optax.join_schedules([warmup, after], [c.warmup_steps])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), its gradient clipped to a global norm first if the config says so.

    Its state has the same structure with and without clipping, so a run may change its mind when it resumes.
    """
    c = config.optimizer
    adamw = optax.adamw(learning_rate(config), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay)
    return optax.chain(optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(), adamw)
