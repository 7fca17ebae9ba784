"""Settings of the whole suite, made before JAX starts."""

import os
import pathlib

CACHE = pathlib.Path(__file__).parent.parent / ".cache"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small solves, beside XLA's own threads
# Tests compile much and compute little: compile fast, and keep what was compiled for the next run.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip()
# Interpreted, each warpgroup that waits keeps one of XLA's threads, and there must be one more: by default as many as cores.
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("SEQJAX_DATA_DIR", str(CACHE / "data"))

from jaxtyping import install_import_hook  # noqa: E402

# The shapes and dtypes that signatures promise are checked at run time, in tests only.
install_import_hook(["seqjax.ops", "seqjax.layers", "seqjax.models.heads", "seqjax.generation"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs hold memory maps, of which a process may have 65,530: the whole suite's are more, and XLA crashes."""
    yield
    jax.clear_caches()
