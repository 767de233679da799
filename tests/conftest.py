"""Eight CPU devices, one compilation cache for all tests and the processes that they start."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"


def pytest_collection_modifyitems(items):
    """Tests of commands and of several processes wait much: begun first, they leave the cores to the others."""
    items.sort(key=lambda item: "system" not in item.path.parts)
