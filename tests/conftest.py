"""Eight CPU devices, one compilation cache for all tests and the processes that they start, and quick compilation."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Most of the tests' time is compilation, and their networks are small.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
