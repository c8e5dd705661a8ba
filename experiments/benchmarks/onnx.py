"""Programs converted to ONNX: `python -m experiments.benchmarks.onnx [NAME ...]` prints their differences as JSON.

For each model the largest difference between the answers of onnxruntime and of the program, relative to the larger of 1
and the answer, over 0, 1, 7 and 1,000 rows of which some are not finite; and milliseconds for 256 rows, of both.

It runs in the environment that `make onnx` makes: jax2onnx wants an older orbax than checkpoints do.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.benchmarks.measure import median_time
from flax_hmog import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG, moments_to_natural
from flax_hmog.em.initialize import random_moments
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import Diagonal
from flax_hmog.networks import ConvNet
from flax_hmog.training import Program, export

COLUMNS = 6


def module(given: nn.Module) -> Program:
    """A module with random variables."""
    x = np.zeros((2, COLUMNS), np.float32)
    return export(given, jax.jit(given.init)(jax.random.key(0), x), inputs=x, platforms=["cpu"])


def fit(obs_dim: int, lat_dim: int, n_components: int, origin: float = 0.0) -> Program:
    """A model in standard form, as fits give it, far from the origin where that is said."""
    natural = moments_to_natural(random_moments(jax.random.key(0), obs_dim, lat_dim, n_components, Diagonal))
    if origin:
        natural = natural.in_frame(Frame.of(np.full(obs_dim, origin), np.ones(obs_dim), np.float32))
    return export(natural, platforms=["cpu"])


def network() -> nn.Module:
    """Convolutions, a smooth activation and a normalisation before a head."""
    layers: list[Any] = [ConvNet(8, (3, 2), widths=(4,), hidden=8), nn.gelu, nn.LayerNorm(), SymmetricHMoG(2, 3)]
    return nn.Sequential(layers)


MODELS: dict[str, Callable[[], Program]] = {
    "differentiable": lambda: module(DifferentiableHMoG(2, 3)),
    "symmetric": lambda: module(SymmetricHMoG(2, 3, obs_rep="full")),
    "analytic": lambda: module(AnalyticHMoG(2, 3, obs_rep="scale")),
    "network": lambda: module(network()),
    "far": lambda: fit(COLUMNS, 2, 3, origin=1e5),
    "large": lambda: fit(784, 50, 200),
}


def compare(program: Program, repeats: int = 10) -> dict[str, Any]:
    """Differences and times of a program and its conversion.

    Raises:
        ValueError: where shapes, dtypes or the rows that are marked differ.
    """
    import jax2onnx
    import onnxruntime

    names = sorted(program(np.zeros((1, *program.rows.shape[1:]))))
    converted = jax2onnx.to_onnx(program.function, [program.rows], input_names=["rows"], output_names=names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(converted.SerializeToString(), options)
    run = lambda rows: dict(zip(names, session.run(None, {"rows": rows}), strict=True))  # noqa: E731
    x = np.random.default_rng(0).normal(size=(1000, *program.rows.shape[1:])).astype(np.float32)
    x[2, 0], x[4, 1], x[5] = np.nan, -np.inf, 1e30
    worst = dict.fromkeys(names, 0.0)
    for count in (0, 1, 7, 1000):
        got, want = run(x[:count]), jax.tree.map(np.asarray, program(x[:count]))
        for name in names:
            if (got[name].shape, got[name].dtype) != (want[name].shape, want[name].dtype):
                raise ValueError(f"compare: {name} must be {want[name].shape} {want[name].dtype}; got {got[name]}.")
            if not np.array_equal(np.isnan(got[name]), np.isnan(want[name])):
                raise ValueError(f"compare: {name} must be NaN in the same rows; got {got[name]}, {want[name]}.")
            gaps = np.abs(got[name] - want[name]) / np.maximum(1, np.abs(want[name]))
            worst[name] = max(worst[name], float(np.nanmax(gaps, initial=0)))
    times = {"onnxruntime": 1e3 * median_time(run, x[:256], repeats=repeats)}
    times["program"] = 1e3 * median_time(program, x[:256], repeats=repeats)
    return {"difference": worst, "milliseconds": times, "nodes": len(converted.graph.node)}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps({name: compare(MODELS[name]()) for name in sys.argv[1:] or MODELS}, indent=2))
