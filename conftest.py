"""The environment of all tests; examples in docstrings take `jax`, `jnp` and `np` as imported."""

import importlib.metadata
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# most of the time goes into compiling what runs once
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# the emitters of fusions take most of that; jaxlib 0.10 has others, later ones end at a flag that they do not know
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def imported(doctest_namespace):
    """Names that examples need not import."""
    doctest_namespace.update(jax=jax, jnp=jnp, np=np)
