"""The environment of all tests; examples in docstrings take `jax`, `jnp` and `np` as imported."""

import atexit
import functools
import gc
import importlib.metadata
import inspect
import os
import shutil
import tempfile
import types

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


def pytest_addoption(parser):
    """`--mesh KIND:DEVICES`; `.ci/meshes` runs over all of them."""
    parser.addoption("--mesh", metavar="KIND:DEVICES", help="run tests within a mesh, as explicit:4 or auto:1")


def pytest_configure(config):
    """The mesh of all tests."""
    if config.getoption("--mesh"):
        kind, _, count = config.getoption("--mesh").partition(":")
        within_mesh(jax.sharding.AxisType[kind.capitalize()], int(count))


def pytest_runtest_setup(item):
    """Within a mesh some tests have nothing to say."""
    one_device = item.get_closest_marker("one_device")
    if item.config.getoption("--mesh") and one_device:
        pytest.skip(one_device.kwargs["reason"])


def within_mesh(kind, count):
    """Sets a mesh as a program does at its start; rows that public functions are given are then split over it."""
    jax.config.update("jax_num_cpu_devices", count)
    mesh = jax.make_mesh((count,), ("rows",), axis_types=(kind,))
    jax.set_mesh(mesh)
    over_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    import flax_hmog.networks
    import flax_hmog.nnx
    import flax_hmog.training  # noqa: F401  so that all public functions are there
    from flax_hmog import HMoGOutput
    from flax_hmog.model import checks

    is_inside = []

    def split(x):
        is_array = type(x) is np.ndarray or (isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
        if not (is_array and x.ndim and x.shape[0] % count == 0 and jnp.issubdtype(x.dtype, jnp.floating)):
            return x
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)  # where x64 was off before, `device_put` keeps its dtype of then
        return jax.device_put(x.astype(dtype), over_rows)

    def splits(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def entered(*args, **kwargs):
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:  # which the function will raise
                return function(*args, **kwargs)
            for name, value in () if is_inside else bound.arguments.items():
                if isinstance(value, HMoGOutput) or (name in ("x", "data") and getattr(value, "ndim", 0) > 1):
                    bound.arguments[name] = jax.tree.map(split, value)
            is_inside.append(function)
            try:
                return function(*bound.args, **bound.kwargs)
            finally:
                is_inside.pop()

        return entered

    code = checks.public(sorted).__code__
    for marked in gc.get_objects():
        if isinstance(marked, types.FunctionType) and marked.__code__ is code:
            cells = dict(zip(code.co_freevars, marked.__closure__, strict=True))
            cells["function"].cell_contents = splits(cells["function"].cell_contents)
