"""What a run tells about itself: means over an interval, to `metrics.jsonl`, TensorBoard and the progress bar."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
from tqdm import tqdm

from dit_jax.files import parse_json, replacing
from dit_jax.parallel.processes import is_first

NOTHING = {"count": 0, "sums": {}}  # what a line begins with


class NotFiniteError(Exception):
    """A metric of a step is infinite or not a number."""

    def __init__(self, step: int, metrics: Mapping[str, float]):
        self.step = step
        super().__init__(f"step {step}: " + ", ".join(f"{k}={v}" for k, v in metrics.items() if not math.isfinite(v)))


class TrainingLog:
    """Takes the metrics of every step and reads them one step late, so that the device never waits for the host.

    Every `log_every` steps their means make a line of `metrics.jsonl` and a point in TensorBoard, with images/s and,
    where the chip's peak is known, MFU. Lines after `first_step`, by a run that was then killed, are dropped: those
    steps come again. `interval` is what the next line has so far, as `unfinished` told a checkpoint. Of several
    processes, all read the metrics and the first one writes.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        last_step: int,
        log_every: int,
        batch_size: int,
        flops_per_image: int,
        peak_flops: float | None,
        interval: Mapping | None = None,
    ):
        self.log_every, self.batch_size = log_every, batch_size
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self._interval = interval or NOTHING
        self._late: tuple[int, dict[str, jax.Array]] | None = None
        self._timed_steps, self._clock = 0, None
        self._created = time.perf_counter()
        self._writes = is_first()
        if self._writes:
            path = workdir / "metrics.jsonl"
            _drop_lines_after(path, first_step)
            self._file = path.open("a")
            self._tensorboard = _summary_writer()(str(workdir / "tensorboard"), purge_step=first_step + 1)
        seconds = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            initial=first_step,
            total=last_step,
            unit="step",
            mininterval=seconds,
            dynamic_ncols=True,
            disable=not self._writes,
        )

    def dispatched(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """The device has been given `step`; now there is time to read the one before. Raises NotFiniteError."""
        late, self._late = self._late, (step, metrics)
        if late:
            self._read(*late)

    def catch_up(self) -> None:
        """Wait for the last step and read it too. Raises NotFiniteError."""
        late, self._late = self._late, None
        if late:
            self._read(*late)

    def unfinished(self) -> Callable[[], dict | None]:
        """What the next line has so far with the last step, or None if that is not finite: to be asked in a thread.

        The thread waits for the step, and the device has the next one meanwhile.
        """
        interval, late = self._interval, self._late

        def ask() -> dict | None:
            if late is None:
                return interval
            step, metrics = late
            try:
                with_it = _counted(interval, step, metrics)
            except NotFiniteError:
                return None
            return NOTHING if step % self.log_every == 0 else with_it

        return ask

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Wait for the last step and read it, then leave what is done in the block out of images/s."""
        self.catch_up()
        started = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - started

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """What was measured at `step`, as a line and points of its own."""
        if self._writes:
            self._record(step, values)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self._writes:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        if self._writes:
            self._file.close()
            self._tensorboard.close()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, step: int, arrays: dict[str, jax.Array]) -> None:
        self._interval = _counted(self._interval, step, arrays)
        if self._clock is None:
            self.say(f"first step after {time.perf_counter() - self._created:.1f} s")
            self._clock = time.perf_counter()
        else:
            self._timed_steps += 1
        self._bar.update(step - self._bar.n)
        if step % self.log_every == 0:
            self._write(step)

    def _write(self, step: int) -> None:
        means = {name: total / self._interval["count"] for name, total in self._interval["sums"].items()}
        self._interval = NOTHING
        if not self._writes:
            return
        self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        self._record(step, means | self._speed())

    def _record(self, step: int, line: Mapping[str, float]) -> None:
        print(json.dumps({"step": step, **line}), file=self._file, flush=True)
        for name, value in line.items():
            self._tensorboard.add_scalar(name, value, step)

    def _speed(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds, steps = now - self._clock, self._timed_steps
        self._clock, self._timed_steps = now, 0
        if not steps:
            return {}
        images = steps * self.batch_size / seconds
        speed = {"images_per_second": images}
        if self.peak_flops:
            speed["mfu"] = images * self.flops_per_image / self.peak_flops
        return speed


def _counted(interval: Mapping, step: int, arrays: dict[str, jax.Array]) -> dict:
    """An interval with one step more, which it waits for. Raises NotFiniteError."""
    metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
    if not all(math.isfinite(value) for value in metrics.values()):
        raise NotFiniteError(step, metrics)
    sums = {name: interval["sums"].get(name, 0.0) + value for name, value in metrics.items()}
    return {"count": interval["count"] + 1, "sums": sums}


def _summary_writer() -> type:
    """tensorboardX's, without PyTorch: it would import that, where it is installed, which takes seconds."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the whole lines of `metrics.jsonl` up to `step`; a kill may have cut the last one.

    Raises InputError, and leaves the file as it is, where a line is not of ours.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines and not lines[-1].endswith("}"):
        lines.pop()
    steps = [parse_json(line, f"line {n} of {path}", step=int).get("step", 0) for n, line in enumerate(lines, start=1)]
    kept = [line for line, its_step in zip(lines, steps, strict=True) if its_step <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
