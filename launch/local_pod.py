"""Run a command as the hosts of a pod, all on this machine: real processes, each with a few CPU devices.

COMMAND is started once a host, with --coordinator, --num_processes and --process_id appended. Every host has a log;
what host 0 says is shown too. Ctrl-C and SIGTERM go to all hosts. When one fails, its first error line is shown and
the others get time to end by themselves. Exits with 0 if all hosts did, else as the first that failed.

Example:
  python launch/local_pod.py --hosts=4 --devices=2 -- \\
    python -m dit_jax.train --config=configs/digits.py --workdir=runs/pod
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

POLL = 0.1  # seconds
ERROR = re.compile(r"error: |fatal|[\w.]*(error|exception|interrupt|exit)\b|F\d{4} ", re.IGNORECASE)


def main() -> int:
    options, command = parse(sys.argv[1:])
    hosts = [Host(i, command, options) for i in range(options.hosts)]
    if options.dry_run:
        print(*hosts, sep="\n")
        return 0
    options.log_dir.mkdir(parents=True, exist_ok=True)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: [host.send(number) for host in hosts])
        for host in hosts:
            host.start()
        return wait(hosts, options.patience)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for host in hosts:
            host.kill()


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [options] -- COMMAND"
    )
    parser.add_argument("--hosts", type=int, default=2, help="processes to start; default 2")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each; default 1")
    parser.add_argument("--log_dir", type=Path, default=Path("runs/local_pod"), help="for host0.log, host1.log, ...")
    parser.add_argument("--patience", type=float, default=60, help="seconds for the rest once one failed; default 60")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(arguments[:split])
    if not arguments[split + 1 :]:
        parser.error("the command is missing; it comes after --")
    if options.hosts < 1 or options.devices < 1:
        parser.error(f"--hosts={options.hosts} --devices={options.devices}: both are at least 1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        options.coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    return options, arguments[split + 1 :]


def wait(hosts: Sequence["Host"], patience: float) -> int:
    """Show what host 0 says until all have ended; the status of the first that failed, or 0."""
    failed, deadline = None, None
    while True:
        running = [host for host in hosts if host.status() is None]
        hosts[0].show()
        if failed is None:
            failed = next((host for host in hosts if host.status()), None)
            if failed:
                print(f"{failed.name} {failed.end()}", file=sys.stderr, flush=True)
                deadline = time.monotonic() + patience
        if not running:
            return failed.status() if failed else 0
        if deadline and time.monotonic() > deadline:
            names = ", ".join(host.name for host in running)
            print(f"{names} still ran {patience:g} s later: killed", file=sys.stderr, flush=True)
            for host in running:
                host.kill()
        time.sleep(POLL)


class Host:
    """One process of the pod and its log."""

    def __init__(self, index: int, command: Sequence[str], options: argparse.Namespace):
        self.name = f"host {index}"
        self.command = [
            *command,
            f"--coordinator={options.coordinator}",
            f"--num_processes={options.hosts}",
            f"--process_id={index}",
        ]
        self.environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
        self.log = options.log_dir / f"host{index}.log"
        self.process, self.shown = None, 0

    def __str__(self) -> str:
        environment = " ".join(f"{name}={value}" for name, value in self.environment.items())
        return f"{environment} {shlex.join(self.command)} > {shlex.quote(str(self.log))} 2>&1"

    def start(self) -> None:
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in the terminal comes once, through us, and all it starts can be killed.
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def status(self) -> int | None:
        """As a shell tells it: None while it runs, 128 + the signal if one ended it."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def end(self) -> str:
        """How it failed, and its first error line."""
        code = self.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((line for line in lines if ERROR.match(line)), lines[-1] if lines else "it said nothing")
        return f"{how}: {said}   ({self.log})"

    def show(self) -> None:
        with self.log.open("rb") as log:
            log.seek(self.shown)
            sys.stdout.buffer.write(log.read())
            self.shown = log.tell()
        sys.stdout.flush()

    def send(self, number: int) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """The process and whatever it started."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


if __name__ == "__main__":
    sys.exit(main())
