"""Eight CPU devices, one compilation cache for all tests and the processes that they start, and quick compilation."""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ["PATH"] += ":/usr/sbin:/sbin"  # Debian's place for Slurm's daemons
SLURM = all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun"))
collect_ignore = [] if SLURM else ["system/test_slurm.py"]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the tests' time is compilation, and their networks are small.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # later ones end at the name of this flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


def pytest_report_header() -> list[str]:
    return [] if SLURM else ["Slurm is not installed (apt-get install slurm-wlm munge): its tests are left out"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker waits for the last file of another."""
    first = ("system", "training")
    items.sort(key=lambda item: first.index(name) if (name := item.path.parent.name) in first else len(first))
