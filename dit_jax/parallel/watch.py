"""A watch over the processes of one program: when one is lost or fails, the others end too and say which it was."""

import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback

from dit_jax.errors import InputError

PERIOD = 2.0  # seconds between two signs of life
SILENCE = 25.0  # seconds without one after which a process is missing
GRACE = 4.0  # seconds in which a process whose peer has failed may fail itself, with its own message
FAREWELL = 15.0  # seconds at most that an ending process stays for others to read why
LOST = 75  # exit status where a process is missing: EX_TEMPFAIL of sysexits.h, start it again; launch/ knows it

_LIBC = ctypes.CDLL(None)
_LIBC.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)


class Watch:
    """Beats in the key-value store that process 0 holds, and ends this process if another one has stopped.

    JAX's own heartbeat takes 100 seconds and names nobody, and devices that wait for one that is gone may wait for
    ever. Here one thread talks to the store, one holds a connection to where it is, and the third one judges by what
    these have seen: so a store that no longer answers is process 0 gone.

    When process 0 dies, JAX aborts at once, with a stack trace of C++. An abort is put off for a few seconds, in which
    the judge can say in a line what has happened.
    """

    def __init__(self, client, address: str, index: int, count: int, advice: str):
        """client, address: of JAX's coordination service. advice: what a user should do when a process is gone."""
        self._client, self._address, self._advice = client, address, advice
        self._index, self._count = index, count
        now = time.monotonic()
        self._beats = dict.fromkeys(range(count), ("", now))  # the last sign of life and when it was new here
        self._ends: dict[int, tuple[int, str]] = {}  # with what status a process has ended, and why
        self._closed = False  # whether nobody listens at the address any more
        self._own_end: tuple[int, str] | None = None
        self._stopped, self._hurry, self._one_ends_it = threading.Event(), threading.Event(), threading.Lock()
        _LIBC.signal(signal.SIGABRT, _LIBC.sleep)  # for as many seconds as SIGABRT's number, 6; it needs no Python
        for run in (self._beat, self._hold_the_line, self._judge):
            threading.Thread(target=run, daemon=True).start()

    def stop(self) -> None:
        """Look no longer: every process has come to its end."""
        self._stopped.set()
        self._hurry.set()
        _LIBC.signal(signal.SIGABRT, None)

    def end(self, error: BaseException) -> None:
        """End this process for `error` and tell the others; with InputError's status 2, SystemExit's own, or 1.

        An error of JAX may come of a process that is gone: then that one is what there is to tell. Never returns.
        """
        if _is_jax_error(error):
            time.sleep(SILENCE + 3 * PERIOD)  # the judge ends this process before, if there is somebody to blame
        self._end_once()
        if isinstance(error, InputError):
            status = 2
            print(f"error: {one_line(error)}", file=sys.stderr)
        elif isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        else:
            status = 1
            traceback.print_exception(error)
        self._leave(status, one_line(error))

    def _beat(self) -> None:
        beat = 0
        while not self._stopped.is_set():
            beat += 1
            try:
                self._client.key_value_set(
                    f"watch/beat/{self._index}", f"{beat} {socket.gethostname()}", allow_overwrite=True
                )
                if self._own_end is not None:
                    status, words = self._own_end
                    self._client.key_value_set(f"watch/end/{self._index}", f"{status} {words}", allow_overwrite=True)
                for key, value in self._client.key_value_dir_get("watch/"):
                    *_, what, other = key.split("/")
                    if what == "end":
                        status, _, words = value.partition(" ")
                        self._ends[int(other)] = int(status), words
                    elif value != self._beats[int(other)][0]:
                        self._beats[int(other)] = (value, time.monotonic())
            except Exception:  # whatever the client raises when there is no store; the judge counts the seconds
                pass
            self._hurry.wait(PERIOD)
            self._hurry.clear()

    def _hold_the_line(self) -> None:
        host, _, port = self._address.rpartition(":")
        while not self._stopped.is_set() and not self._closed:
            try:
                with socket.create_connection((host.strip("[]"), int(port)), timeout=SILENCE) as line:
                    line.settimeout(None)
                    while line.recv(4096):
                        pass
            except ConnectionRefusedError:
                self._closed = True
            except OSError:  # of the network between, which may come back
                self._stopped.wait(PERIOD)
            self._stopped.wait(PERIOD / 10)

    def _judge(self) -> None:
        while not self._stopped.wait(PERIOD / 4):
            ended = [other for other in self._ends if other != self._index]
            if ended:
                time.sleep(GRACE)
            if verdict := self._verdict(ended):
                self._end_once()
                print(f"\nerror: {verdict[1]}", file=sys.stderr)  # below a progress bar
                self._leave(*verdict)

    def _verdict(self, ended: list[int]) -> tuple[int, str] | None:
        """With what status this process is to end, and why."""
        if self._closed:
            return LOST, f"{self._name(0)} is missing: its connection is closed; {self._advice}"
        silent = {other: time.monotonic() - since for other, (_, since) in self._beats.items()}
        # From a store that does not answer, this process's own beats do not come back either.
        gone = 0 if silent[self._index] > SILENCE else max(silent, key=silent.get)
        if silent[gone] > SILENCE:
            return LOST, f"{self._name(gone)} is missing: no sign of life for {SILENCE:.0f} s; {self._advice}"
        if not ended:
            return None
        status, words = self._ends[ended[0]]
        return LOST if status == LOST else 1, f"{self._name(ended[0])} has ended: {words}"

    def _name(self, other: int) -> str:
        host = self._beats[other][0].partition(" ")[2]
        return f"process {other} of {self._count}" + (f" (host {host})" if host else "")

    def _end_once(self) -> None:
        """Returns in one thread; the process ends before it would in another."""
        while not self._one_ends_it.acquire(timeout=3600):
            pass

    def _leave(self, status: int, last_words: str) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._own_end = status, last_words
        self._hurry.set()
        deadline = time.monotonic() + FAREWELL
        while time.monotonic() < deadline and not self._heard():
            time.sleep(0.05)
        os._exit(status)  # an orderly end would wait minutes for the processes that are gone

    def _heard(self) -> bool:
        """Whether this process may go: its last words are in the store, which process 0 holds until all have ended."""
        if self._closed:
            return True
        silent = {i for i, (_, since) in self._beats.items() if time.monotonic() - since > SILENCE}
        if self._index != 0:
            return self._index in self._ends or self._index in silent
        return all(i in self._ends or i in silent for i in range(self._count))


def one_line(error: BaseException) -> str:
    """An exception's message, or its type, as one line."""
    text = " ".join(str(error).split())[:300]
    return (
        text if isinstance(error, InputError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
    )


def _is_jax_error(error: BaseException | None) -> bool:
    """Whether JAX's runtime is at its root. A collective that fails as it is dispatched is a ValueError, which begins
    with the runtime's status as all its errors do: `UNKNOWN: Gloo AllGather failed: ... Connection reset by peer`."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match(r"[A-Z_]{5,}: ", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
