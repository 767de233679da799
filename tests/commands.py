"""The commands as typed, each in a process of its own.

The processes are forks of one that has imported most libraries: that would take longer than what the commands do here.
Each has one CPU device, unless `devices` says how many; any other keyword is a variable of its environment.
"""

import atexit
import os
import runpy
import sys
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import jax

PATIENCE = 300  # seconds, for a busy machine

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "sklearn.datasets"])


def succeeds(command: str, *args: str | Path, **options) -> CompletedProcess:
    """What it did, with exit status 0."""
    result = _run(command, *args, **options)
    assert result.returncode == 0, result.stderr
    return result


def refuses(told: str, command: str, *args: str | Path, **options) -> str:
    """The one line that it said after whatever progress it showed: with `told` in it, exit status 2, no output."""
    result = _run(command, *args, **options)
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2, result.stderr
    assert line.startswith("error: ") and told in line, line
    assert "Traceback" not in result.stderr and not result.stdout
    return line


def _run(command: str, *args: str | Path, devices: int = 1, **environment: str) -> CompletedProcess:
    """What `python -m dit_jax.COMMAND ARGS` did."""
    arguments = [f"dit_jax.{command}", *map(str, args)]
    with TemporaryDirectory() as folder:
        streams = [Path(folder, "stdout"), Path(folder, "stderr")]
        process = _forks.Process(target=_become, args=(arguments, os.environ | environment, devices, streams))
        for path in streams:
            path.touch()
        process.start()
        process.join(PATIENCE)
        process.kill()
        process.join()
        return CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams))


def _become(arguments: list[str], environment: dict[str, str], devices: int, streams: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update("jax_num_cpu_devices", devices)  # JAX has read the variable when it was imported
    for path, stream in zip(streams, (sys.stdout, sys.stderr), strict=True):
        with path.open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = arguments
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
