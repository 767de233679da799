import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from dit_jax.data.loader import READ_SIZE, Loader
from dit_jax.data.sources import ArraySource, CorruptImageError, open_source
from dit_jax.errors import InputError


def _numbered(count, classes=5):
    """Images of 2x2 pixels whose left column holds their index, and whose right one is black."""
    images = np.zeros((count, 2, 2, 1), np.uint8)
    images[:, :, 0, 0] = np.arange(count)[:, None]
    return ArraySource("numbered", images, np.arange(count) % classes, tuple(map(str, range(classes))))


def _loader(source, batch_size, **options):
    return Loader(source, image_size=2, batch_size=batch_size, seed=3, **({"threads": 2} | options))


def _take(loader, steps, start_step=0):
    with loader.batches(start_step) as batches:
        return list(itertools.islice(batches, steps))


def _numbers(batches):
    """The index of every image, in order: whichever column is not black holds it."""
    x = np.concatenate([np.asarray(batch["x"]) for batch in batches])
    return np.round((x + 1) * 127.5).astype(int)[:, 0, :, 0].max(axis=1)


def _assert_same(one, other):
    for batch, twin in zip(one, other, strict=True):
        np.testing.assert_array_equal(batch["x"], twin["x"])
        np.testing.assert_array_equal(batch["y"], twin["y"])


def test_batch_holds_normalised_images_and_their_labels():
    batches = _take(_loader(_numbered(20), 8), 3)
    for batch in batches:
        assert batch["x"].shape == (8, 2, 2, 1) and batch["x"].dtype == np.float32
        assert batch["y"].shape == (8,) and batch["y"].dtype == np.int32
        assert batch["x"].min() == -1.0
    np.testing.assert_array_equal(np.concatenate([b["y"] for b in batches]), _numbers(batches) % 5)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_global_batch_is_the_same_from_any_number_of_processes(processes):
    options = {"flip": True}
    whole = _take(_loader(_numbered(23), 40, **options), 4)
    parts = [
        _take(_loader(_numbered(23), 40, **options, process_index=h, process_count=processes), 4)
        for h in range(processes)
    ]
    joined = [
        {name: np.concatenate([p[name] for p in step]) for name in ("x", "y")} for step in zip(*parts, strict=True)
    ]
    _assert_same(whole, joined)


def test_every_epoch_holds_every_record_once_across_batch_borders():
    numbers = _numbers(_take(_loader(_numbered(23), 10), 7))
    for epoch in range(3):
        assert sorted(numbers[23 * epoch : 23 * (epoch + 1)]) == list(range(23))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed):
        return _numbers(_take(Loader(_numbered(50), image_size=2, batch_size=100, seed=seed), 1)).reshape(2, 50)

    orders = [*order(0), *order(1)]
    assert all((one != other).mean() > 0.8 for one, other in itertools.combinations(orders, 2))
    np.testing.assert_array_equal(order(1), orders[2:])


@pytest.mark.parametrize("step", [1, 5, 13])
def test_resuming_at_a_step_continues_the_sequence_from_zero(step):
    loader = _loader(_numbered(23), 18, flip=True)
    _assert_same(_take(loader, 4, start_step=step), _take(loader, step + 4)[step:])


def test_a_late_step_is_reached_without_reading_those_before():
    class Counting(ArraySource):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    numbered = _numbered(23)
    source = Counting("counting", numbered.images, numbered.labels, numbered.class_names)
    assert len(_take(_loader(source, 4), 1, start_step=10**12)) == 1
    assert source.reads < 100


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    source = _numbered(250)
    plain, flipped, again = (_take(_loader(source, 100, flip=flip), 10) for flip in (False, True, True))
    _assert_same(flipped, again)
    x, mirrored = (np.concatenate([batch["x"] for batch in batches]) for batches in (plain, flipped))
    coins = (mirrored == x[:, :, ::-1]).all(axis=(1, 2, 3)) & (_numbers(plain) > 0)
    np.testing.assert_array_equal(mirrored, np.where(coins[:, None, None, None], x[:, :, ::-1], x))
    assert 420 < coins.sum() < 580
    assert 75 < (coins[:250] != coins[250:500]).sum() < 175, "every epoch has coins of its own"


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 3, 6, 1, 4]])
def test_sharded_batch_is_the_batch_of_one_process(order):
    mesh = Mesh(np.array(jax.devices())[order].reshape(4, 2), ("data", "tensor"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    whole, sharded = (_take(_loader(_numbered(23), 12, sharding=s), 3, start_step=2) for s in (None, sharding))
    for batch in sharded:
        assert all(batch[name].sharding == sharding for name in ("x", "y"))
        assert batch["x"].addressable_shards[0].data.shape == (3, 2, 2, 1)
    _assert_same(whole, sharded)


def test_two_processes_hold_the_rows_of_their_devices_wherever_the_mesh_puts_them(tmp_path):
    script = tmp_path / "pod.py"
    script.write_text(
        textwrap.dedent("""
        import sys, numpy as np, jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from dit_jax.data.loader import Loader
        from dit_jax.data.sources import open_source

        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
        devices = sorted(jax.devices(), key=lambda d: (d.id % 2, d.process_index))
        assert [d.process_index for d in devices] == [0, 1, 0, 1]
        sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
        options = dict(image_size=8, batch_size=8, seed=0, flip=True)
        ours = Loader(open_source("digits"), **options, sharding=sharding)
        whole = Loader(open_source("digits"), **options, process_index=0, process_count=1)
        assert len(ours.rows) == 4
        with ours.batches(5) as sharded, whole.batches(5) as expected:
            for _ in range(3):
                batch, rows = next(sharded), next(expected)
                for name in ("x", "y"):
                    assert batch[name].shape == rows[name].shape
                    for shard in batch[name].addressable_shards:
                        np.testing.assert_array_equal(shard.data, rows[name][shard.index])
        print("same")
        """)
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    processes = [
        subprocess.Popen([sys.executable, script, str(i), address], stdout=-1, stderr=-1, text=True, env=environment)
        for i in range(2)
    ]
    for output, errors in [process.communicate(timeout=60) for process in processes]:
        assert output == "same\n", errors


@pytest.fixture
def folder(tmp_path):
    """Three classes of four images, the second of each class (1, 5, 9) truncated."""
    for index in range(12):
        path = tmp_path / "images" / str(index // 4) / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(path, quality=95)
        if index % 4 == 1:
            path.write_bytes(path.read_bytes()[:400])
    return tmp_path / "images"


def test_corrupt_image_stops_the_run_at_its_own_step_with_its_path(folder):
    source = open_source(f"folder:{folder}")
    order = _take(Loader(_numbered(12), image_size=2, batch_size=12, seed=3), 1)
    first = next(i for i, number in enumerate(_numbers(order)) if number % 4 == 1)
    loader = Loader(source, image_size=8, batch_size=1, seed=3)
    with loader.batches(0) as batches:
        for _ in range(first):
            next(batches)
        with pytest.raises(CorruptImageError, match="cannot be decoded") as caught:
            next(batches)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(StopIteration):
            next(batches)


def test_skipped_image_is_replaced_by_the_next_readable_one_and_counted(folder):
    plain = _numbers(_take(Loader(_numbered(12), image_size=2, batch_size=6, seed=3), 4))
    loader = Loader(open_source(f"folder:{folder}"), image_size=8, batch_size=6, seed=3, skip_corrupt=True)
    batches = _take(loader, 4)
    red = np.concatenate([(batch["x"][:, 0, 0, 0] + 1) * 127.5 for batch in batches])
    np.testing.assert_array_equal(np.round(red / 20), [n + 1 if n % 4 == 1 else n for n in plain])
    np.testing.assert_array_equal(np.concatenate([b["y"] for b in batches]), plain // 4)
    assert loader.skipped == 6


def test_folder_of_corrupt_images_alone_is_an_error_and_no_endless_search(folder):
    for path in folder.glob("*/*.jpg"):
        path.write_bytes(b"nothing")
    loader = Loader(open_source(f"folder:{folder}"), image_size=8, batch_size=2, seed=0, skip_corrupt=True)
    with pytest.raises(InputError, match="not one of the 12 images of folder:"), loader.batches(0) as batches:
        next(batches)


@pytest.mark.parametrize("label", [-1, 5])
def test_label_outside_the_classes_is_told_with_its_record(label):
    source = _numbered(10)
    source.labels[7] = label
    with pytest.raises(InputError, match=rf"record 7 of numbered has the label {label}: expected 0 to 4"):
        _take(_loader(source, 10), 1)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"seed": -1}, {"threads": 0}, {"image_size": 0}])
def test_number_out_of_range_is_refused(option):
    (setting,) = (f"{name}={value}" for name, value in option.items())
    with pytest.raises(InputError, match=setting):
        Loader(_numbered(20), **({"image_size": 2, "batch_size": 4, "seed": 0} | option))


def test_source_of_one_record_and_an_empty_one():
    assert _numbers(_take(_loader(_numbered(1), 3), 1)).tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="numbered holds no records"):
        _loader(_numbered(0), 3)


def test_batch_size_that_cannot_be_split_is_refused():
    with pytest.raises(InputError, match="batch_size=10 cannot be split over 4 processes"):
        _loader(_numbered(20), 10, process_index=0, process_count=4)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    with pytest.raises(InputError, match="batch_size=12 cannot be split over the mesh"):
        _loader(_numbered(20), 12, sharding=sharding)


class _Slow(ArraySource):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        time.sleep(0.005)
        return super().__getitem__(index)


@pytest.mark.parametrize("ending", ["with", "exception", "close", "dropped", "error of a reader"])
def test_threads_end_with_the_batches_and_leave_what_they_had_not_begun(ending):
    numbered = _numbered(200)
    source = _Slow("slow", numbered.images, numbered.labels, numbered.class_names)
    loader = _loader(source, 64)
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        batches = loader.batches(0).__enter__() if ending == "dropped" else stack.enter_context(loader.batches(0))
        next(batches)
        readers = set(threading.enumerate()) - before
        assert len(readers) == loader.threads
        reads = source.reads
        if ending == "exception":
            with pytest.raises(KeyError), stack:
                raise KeyError
        elif ending == "with":
            stack.close()
        elif ending == "close":
            batches.close()
        elif ending == "dropped":
            del batches
        else:
            source.labels = source.labels - 5
            with pytest.raises(InputError, match="has the label"):
                for _ in range(3):
                    reads = source.reads
                    next(batches)
            reads += 64  # of the batch that failed, if all of it had been read
        for thread in readers:
            thread.join(timeout=5)
        assert not any(thread.is_alive() for thread in readers)
        assert source.reads <= reads + loader.threads * READ_SIZE
        if ending in ("exception", "with", "close"):
            with pytest.raises(StopIteration):
                next(batches)


CONSUMER = """
import signal, sys
from dit_jax.data.loader import Loader
from dit_jax.data.sources import open_source

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored
with Loader(open_source("synthetic:64"), image_size=64, batch_size=256, seed=0).batches(0) as batches:
    next(batches)
    print("ready", flush=True)
    if sys.argv[1] == "fail":
        raise RuntimeError("the consumer failed")
    for batch in batches:
        pass
"""


@pytest.mark.parametrize(
    ("then", "code", "error"), [("fail", 1, "RuntimeError: the consumer failed\n"), ("read", -2, "KeyboardInterrupt\n")]
)
def test_program_that_fails_or_is_interrupted_ends_at_once_and_says_only_why(then, code, error):
    process = subprocess.Popen([sys.executable, "-c", CONSUMER, then], stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        if then == "read":
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == code
    assert errors.count("Traceback") == 1 and errors.endswith(error)
