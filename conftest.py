"""The environment of all tests; examples in docstrings take `jax`, `jnp` and `np` as imported."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# most of the time goes into compiling what runs once
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# level 1 is that of tests that want optimized programs. Emitters of fusions take most of the time;
# jaxlib 0.10 has others, later ones end at a flag that they do not know
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1",
    )
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
# workers, and commands that tests call, share the compiled programs of one run, and none of the user's
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-of-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def imported(doctest_namespace):
    """Names that examples need not import."""
    doctest_namespace.update(jax=jax, jnp=jnp, np=np)
