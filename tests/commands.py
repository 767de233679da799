"""The commands as typed, each in a process of its own.

The processes are forks of one that has imported most libraries: that would take longer than what the commands do here.
Each has one CPU device, unless `devices` says how many; any other keyword is a variable of its environment.
"""

import atexit
import itertools
import os
import runpy
import signal
import sys
import warnings
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

PATIENCE = 400  # seconds, for a busy machine

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "sklearn.datasets"])
_numbers = itertools.count()


class Command:
    """`python -W ignore -m dit_jax.COMMAND ARGS`, started; a name with a dot is that of a module of the tests."""

    def __init__(self, command: str, *args: str | Path, devices: int = 1, **environment: str):
        arguments = [command if "." in command else f"dit_jax.{command}", *map(str, args)]
        number = next(_numbers)
        self._streams = [Path(_said().name, f"{number}.{name}") for name in ("out", "err")]
        for path in self._streams:
            path.touch()
        settings = arguments, os.environ | environment, devices, self._streams
        self._process = _forks.Process(target=_become, args=settings)
        self._process.start()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._streams[0].read_text()

    @property
    def stderr(self) -> str:
        return self._streams[1].read_text()

    @property
    def status(self) -> int | None:
        """None while it runs, and negative if a signal has ended it."""
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status; it is killed if it has none by then."""
        self._process.join(timeout)
        ended = self.status is not None
        self.kill()
        assert ended, f"it has not ended within {timeout:.0f} s:\n{self.stderr}"
        return self.status


def succeeds(command: str, *args: str | Path, **options) -> Command:
    """What it did, with exit status 0."""
    result = Command(command, *args, **options)
    assert result.wait() == 0, result.stderr
    return result


def refuses(told: str, command: str, *args: str | Path, **options) -> str:
    """The one line that it said after whatever progress it showed: with `told` in it, exit status 2, no output."""
    result = Command(command, *args, **options)
    assert result.wait() == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and told in line, line
    assert "Traceback" not in result.stderr and not result.stdout
    return line


@cache
def _said() -> TemporaryDirectory:
    """Of this process: the forks import this module too."""
    return TemporaryDirectory(prefix="commands-")


def _become(arguments: list[str], environment: dict[str, str], devices: int, streams: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    jax.config.update("jax_num_cpu_devices", devices)  # JAX has read the variable when it was imported
    for path, stream in zip(streams, (sys.stdout, sys.stderr), strict=True):
        with path.open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = arguments
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
