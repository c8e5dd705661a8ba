"""What every test shares: strict JAX settings, seeded keys, float64 and a compilation counter."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# files that take longest, as measured: they come first, so that no worker ends with one of them alone
LONG_FILES = ["test_docs", "test_experiments", "test_processes", "test_nnx", "test_likelihood", "test_sklearn", "test_sparse",
    "test_accelerated", "test_invariance", "test_rounds", "test_page", "test_tables", "test_select"]  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


COMPILED = []  # one entry for every program that XLA has compiled in this process


def _count_compilation(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class Programs:
    """Compiled programs of this process: what they hold is given back to the system before it is much."""

    MAPS = 30_000  # of memory, of which Linux gives a process 65,530: XLA stops where they run out

    def __init__(self):
        self.least = self.resident()

    def resident(self):
        """Bytes of memory, 0 where the system does not say."""
        pages = Path("/proc/self/statm")
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0

    def maps(self):
        maps = Path("/proc/self/maps")
        return len(maps.read_text().splitlines()) if maps.exists() else 0

    def drop_if_many(self, growth):
        """Where they have taken so many bytes since the last time."""
        if self.resident() < self.least + growth and self.maps() < self.MAPS:
            return
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self.least = self.resident()


PROGRAMS = Programs()


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Few of those that a module leaves serve the next one."""
    yield
    PROGRAMS.drop_if_many(2**29)


@pytest.fixture(autouse=True)
def programs_that_fit():
    """Within a module, where they do serve, as it may take gigabytes."""
    yield
    PROGRAMS.drop_if_many(5 * 2**28)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimized():
    """Of programs that run long, which are worth the compiler's time; they round otherwise, and serve no other test."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def compilations():
    """A function: how many programs a call compiled."""

    def count(function, *args, **kwargs):
        before = len(COMPILED)
        jax.block_until_ready(function(*args, **kwargs))
        return len(COMPILED) - before

    return count
