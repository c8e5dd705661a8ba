"""One measurement in a process of its own: `python -m experiments.benchmarks.measure SIZE TASK REPEATS` prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.sizes import SIZES, Size
from flax_hmog import (
    Diagonal,
    DifferentiableHMoG,
    PseudoCounts,
    em_step,
    moments_to_natural,
    posterior_soft_assignments,
)
from flax_hmog.em.initialize import random_moments
from flax_hmog.model.kinds import matmul

MAX_FLOATS = 2**28  # of an operand of a product that is timed alone


def median_time(function: Callable, *arguments: Any, repeats: int) -> float:
    """Median seconds of a call that was made once before."""
    jax.block_until_ready(function(*arguments))
    return float(np.median([one_time(function, *arguments) for _ in range(repeats)]))


def one_time(function: Callable, *arguments: Any) -> float:
    """Seconds of one call, until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def draw(size: Size) -> jax.Array:
    """Samples (N, D) of a random model of this size; they are drawn on the device, in pieces."""
    moments = random_moments(jax.random.key(0), size.obs_dim, size.lat_dim, size.n_components, Diagonal)

    @jax.jit
    def piece(key: jax.Array) -> jax.Array:
        latent_key, noise_key, component_key = jax.random.split(key, 3)
        z = jax.random.categorical(component_key, jnp.zeros(size.n_components), shape=(rows,))
        y = 2 * moments.means[z] + jax.random.normal(latent_key, (rows, size.lat_dim))
        return matmul(y, moments.loadings.T) + jax.random.normal(noise_key, (rows, size.obs_dim))

    rows = min(size.count, 2000)
    keys = jax.random.split(jax.random.key(1), -(-size.count // rows))
    x = jnp.zeros((size.count, size.obs_dim))
    write = jax.jit(lambda x, rows, start: jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0), donate_argnums=0)
    for index, key in enumerate(keys):
        x = write(x, piece(key), min(index * rows, size.count - rows))
    return jax.block_until_ready(x)


def product_times(size: Size, *, full: bool, repeats: int) -> list[float]:
    """Seconds of the five matrix products that a pass needs, each alone at the same shapes and precision.

    X Theta, [t, t t'] times coefficients, R' [t, t t'], R times coefficients and X' E[y | x]; for a gradient step the
    first two are its forward products, the others their transposes. With diagonal posteriors t t' is t squared. Where
    the operands would not fit in memory, fewer rows are timed and the time is scaled.
    """
    d, lat, k = size.obs_dim, size.lat_dim, size.n_components
    features = lat + (lat * (lat + 1) // 2 if full else lat)
    n = min(size.count, MAX_FLOATS // features)
    shapes = [((n, d), (d, lat)), ((n, features), (features, k)), ((k, n), (n, features)), ((n, k), (k, features))]
    shapes.append(((d, n), (n, lat)))
    product, transposed = jax.jit(matmul), jax.jit(lambda a, b: matmul(a.T, b))
    times = []
    for left, right in shapes:
        is_transposed = left[1] == n
        a = jax.random.normal(jax.random.key(0), left[::-1] if is_transposed else left)
        b = jax.random.normal(jax.random.key(1), right)
        times.append(median_time(transposed if is_transposed else product, a, b, repeats=repeats))
    return [seconds * size.count / n for seconds in times]


def em(size: Size, x: jax.Array) -> Callable:
    """A step of exact EM, diagonal noise, with a regulariser."""
    moments = random_moments(jax.random.key(2), size.obs_dim, size.lat_dim, size.n_components, Diagonal)
    natural, regularizer = moments_to_natural(moments), PseudoCounts().regularizer(moments)
    return lambda: em_step(natural, x, None, regularizer)


def gradient(size: Size, x: jax.Array, method: str = "mean_log_density") -> Callable:
    """A step of Adam on the mean log-density of all samples, diagonal noise and posteriors."""
    head, optimizer = DifferentiableHMoG(size.lat_dim, size.n_components), optax.adam(1e-3)
    params = head.init(jax.random.key(2), x[:1])["params"]
    state = optimizer.init(params)

    def loss(params: Any, x: jax.Array) -> Any:
        density: Any = head.apply({"params": params}, x, method=method)
        return -jnp.mean(density)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array) -> Any:
        value, slope = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    return lambda: step(params, state, x)


def assign(size: Size, x: jax.Array) -> Callable:
    """Responsibilities of all samples, full components."""
    moments = random_moments(jax.random.key(2), size.obs_dim, size.lat_dim, size.n_components, Diagonal)
    natural = moments_to_natural(moments)
    return lambda: posterior_soft_assignments(natural, x)


def gradient_of_rows(size: Size, x: jax.Array) -> Callable:
    """The same step by automatic differentiation of the densities of rows."""
    return gradient(size, x, "log_observable_density")


TASKS = {"em": em, "gradient": gradient, "gradient-of-rows": gradient_of_rows, "assign": assign}


class PeakMemory:
    """The most bytes in use, less those at the start: of us since the start, or of a device that says since ever."""

    def __init__(self) -> None:
        self.device = jax.devices()[0]
        if not self.device.memory_stats():
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        self.start = self._read("bytes_in_use", "VmRSS")

    def above_start(self) -> int:
        """The bytes."""
        return self._read("peak_bytes_in_use", "VmHWM") - self.start

    def _read(self, of_device: str, of_process: str) -> int:
        if stats := self.device.memory_stats():
            return stats[of_device]
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(of_process + ":")[1].split()[0])


def measure(size: Size, task: str, repeats: int) -> dict[str, Any]:
    """Times in seconds, memory in bytes, and the ratio of the products' time to the time of the whole."""
    x = draw(size)
    memory = PeakMemory()
    call = TASKS[task](size, x)
    first = one_time(call)
    seconds = median_time(call, repeats=repeats)
    result = {"seconds": seconds, "compile_seconds": first - seconds, "peak_bytes_above_data": memory.above_start()}
    del x, call
    needed = product_times(size, full=not task.startswith("gradient"), repeats=repeats)
    if task == "assign":
        needed = needed[:2]
    return result | {
        "product_seconds": needed,
        "ratio": sum(needed) / seconds,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
    }


if __name__ == "__main__":
    name, task, repeats = sys.argv[1:]
    print(json.dumps(measure(SIZES[name], task, int(repeats))))
