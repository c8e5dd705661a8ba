"""Is the host faster than the step that it feeds? `python -m experiments.benchmarks.input`.

A memory-mapped file of 60,000 x 784 bytes (random ones: their values do not matter) is read in shuffled batches, as
training does. Timed apart: reading and preprocessing a batch, a training step on one batch over and over, and training
as it is, with batches read ahead. Medians, in one process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from flax_hmog import PseudoCounts, natural_to_moments
from flax_hmog.recipe import Augmentation, Data, Experiment, Gradient, Model, Template
from flax_hmog.recipe.inputs import Batches, prepare_inputs
from flax_hmog.recipe.load import load
from flax_hmog.recipe.models import Extra, Trainable
from flax_hmog.training import create_state, make_mesh

ROWS, IMAGE = 60_000, (28, 28)
CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, augmented": {"augmentation": Augmentation(2.0, 10.0, 0.1)},
    "MLP, augmented": {"augmentation": Augmentation(2.0, 10.0, 0.1), "encoder": Template("mlp")},
}


def main(batch_size: int = 1024, steps: int = 40) -> None:
    """Print the table.

    Args:
        batch_size: rows of a batch.
        steps: of which medians are taken.
    """
    table = Table("model", "read a batch", "a step", "a step with batches read ahead", title="milliseconds")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (ROWS, *IMAGE)).astype(np.uint8))
        for name, options in CASES.items():
            data = Data("file", path=str(path), scale="range", test_share=0.01)
            # with an encoder, a head of ten clusters on its features
            model = Model(8, 10) if "encoder" in options else Model(50, 200)
            gradient = Gradient(epochs=4, batch_size=batch_size)
            config = Experiment("", data=data, model=model, gradient=gradient, **options)
            table.add_row(name, *(f"{1e3 * seconds:.2f}" for seconds in measure(config, steps)))
    console = Console()
    console.print(table)
    console.print(f"batches of {batch_size} x 784; {jax.devices()[0].device_kind}, jax {jax.__version__}")


def measure(config: Experiment, steps: int) -> tuple[float, float, float]:
    """Median seconds of reading a batch, of a step, and of a step with its batch."""
    mesh = make_mesh()
    inputs = prepare_inputs(config.data, load(config.data, 0), mesh)
    batches = Batches(inputs, 0, config.gradient.batch_size, 1)
    model = Trainable(config, "differentiable", config.n_clusters, inputs.obs_dim, IMAGE)
    x = batches[0]
    variables = jax.jit(model.module.init)(jax.random.key(0), x)
    state = create_state(model.module, variables, model.optimizer(steps), x, mesh)
    regularizer = None
    if model.encoder is None:
        moments = natural_to_moments(model.natural(state.variables))
        regularizer = jax.tree.map(np.asarray, PseudoCounts(components=0.0).regularizer(moments))
    key_data = np.asarray(jax.random.key_data(jax.random.key(0)))
    step = model.step(state, mesh)

    def one_step(x: Any, number: int) -> None:
        nonlocal state
        phases = np.zeros(2, np.uint32)
        state, loss = step(state, x, Extra(regularizer, np.float32(0), None, phases, key_data, np.uint32(number)))
        jax.block_until_ready(loss)

    one_step(x, 0)
    iterator = batches.iterate()
    reading = median(lambda number: jax.block_until_ready(batches[number]), steps)
    return (
        reading,
        median(lambda number: one_step(x, number), steps),
        median(lambda number: one_step(next(iterator), number), steps),
    )


def median(function: Callable[[int], Any], steps: int) -> float:
    """Median seconds of calls with the numbers of steps."""
    times = []
    for number in range(steps):
        start = time.perf_counter()
        function(number)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.input")
