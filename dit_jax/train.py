"""Train a DiT from a config; the same command resumes.

Example:
  python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits --config.steps=2000
"""

from absl import flags
from ml_collections import config_flags

from dit_jax import cli
from dit_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file("config", help_string="Path of a config; --config.FIELD=VALUE changes it.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, previews.")


def main() -> None:
    from dit_jax.training.loop import DivergedError, train

    config, workdir = CONFIG.value, WORKDIR.value
    try:
        config.lock()  # the config file is read at first use
    except OSError as error:
        raise InputError(str(error)) from error
    try:
        step = train(config, workdir)
    except DivergedError as error:
        cli.fail(str(error), status=1)
    if step < config.steps:
        print(f"stopped and saved at step {step} of {config.steps}; the same command goes on from there")
    else:
        print(f"trained to step {step}: {workdir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
