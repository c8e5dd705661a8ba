"""What every test shares: strict JAX settings, seeded keys, float64, the shared folder and a compilation counter."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# most of the time goes into compiling what runs once
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"
COMPILED = []  # one entry for every program that XLA has compiled in this process


def _count_compilation(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(duration)


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Every compiled program holds memory maps, of which Linux gives a process 65,530: XLA stops where they run out."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 30_000:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def eager():
    """Without compilation: operations are shared between cases of one shape, so that whole grids of cases are cheap."""
    with jax.disable_jit():
        yield


@pytest.fixture
def optimized():
    """Of programs that run long, which are worth the compiler's time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def shared():
    if not (SHARED / "fixtures").is_dir():
        pytest.skip(f"the golden numbers are missing: no folder {SHARED / 'fixtures'} beside the checkout")
    return SHARED


@pytest.fixture
def compilations():
    """A function: how many programs a call compiled."""

    def count(function, *args, **kwargs):
        before = len(COMPILED)
        jax.block_until_ready(function(*args, **kwargs))
        return len(COMPILED) - before

    return count
