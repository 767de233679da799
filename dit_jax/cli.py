"""How every command starts and ends: absl flags, `--help`, and errors as one line with exit status 2."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from dit_jax.errors import InputError


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Parse the command line, then call `main` with the values of the positional `arguments`, all of them required.

    Exits with 0 when main returns, 2 with one line on stderr for a wrong argument or an InputError. Any other
    exception is a bug and keeps its traceback.
    """
    if {"-h", "-help", "--help"} & set(sys.argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    try:
        _, *values = flags.FLAGS(sys.argv)
        if len(values) > len(arguments):
            raise InputError(
                f"unexpected argument {values[len(arguments)]!r}; flags look like --name=value, see --help"
            )
        if len(values) < len(arguments):
            raise InputError(f"{arguments[len(values)]} is missing; see --help")
    except (flags.Error, InputError, OSError) as error:
        fail(str(error), status=2)
    except AttributeError as error:  # what config_flags raises for a field that the config lacks
        fail(f"no config field {error}; dit_jax/config.py lists them", status=2)
    try:
        main(*values)
    except InputError as error:
        fail(str(error), status=2)


def fail(message: str, status: int) -> None:
    """Print `message` as one line on stderr and exit."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)
