"""Train a DiT from a config; the same command resumes.

Example:
  python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits --config.steps=2000

On several hosts, the same command in a process on each of them, with a --workdir that all of them see.
"""

from absl import flags
from ml_collections import config_flags

from dit_jax import cli
from dit_jax.errors import InputError
from dit_jax.parallel import processes

CONFIG = config_flags.DEFINE_config_file("config", help_string="Path of a config; --config.FIELD=VALUE changes it.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, previews.")
flags.adopt_module_key_flags(processes)


@processes.together(saves_when_stopped=True)
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
        processes.say(f"stopped and saved at step {step} of {config.steps}; the same command goes on from there")
    else:
        processes.say(f"trained to step {step}: {workdir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
