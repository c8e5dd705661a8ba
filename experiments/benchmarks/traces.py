"""Count functions and files of ours between a public call and its result: `python -m experiments.benchmarks.traces`.

All that run in the first call, tracing included; lambdas and comprehensions do not count.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_hmog
from flax_hmog import AnalyticHMoG, DifferentiableHMoG, cli, fit_em
from flax_hmog.training import CheckpointWriter, restore

COMMAND = ["train", "digits", "--n-seeds", "1", "--em.n-restarts", "1", "--em.max-steps", "2", "--gradient.epochs", "1"]
PACKAGE = Path(flax_hmog.__file__).parent


def entered(call: Callable[[], Any]) -> tuple[int, int]:
    """How many functions and files of the package a call enters."""
    ran = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            ran.add((code.co_filename, code.co_qualname))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(ran), len({file for file, _ in ran})


def main() -> None:
    """Print a line per call."""
    x, key = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32), jax.random.key(0)
    analytic, trained = AnalyticHMoG(2, 3), DifferentiableHMoG(2, 3)
    variables = trained.init(key, x)
    jax.clear_caches()
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(folder, head=trained) as writer:
            writer.save(0, variables)
        calls = {
            "fit_em": lambda: fit_em(analytic, x, key, max_steps=2),
            "a head's call": lambda: trained.apply(variables, x),
            "restore(path)(x)": lambda: restore(folder)(x),
            "command line to checkpoint": lambda: cli.main([*COMMAND, "--workdir", f"{folder}/run"]),
        }
        for name, call in calls.items():
            functions, files = entered(call)
            print(f"{name:26s} {functions:4d} functions in {files:2d} files")


if __name__ == "__main__":
    main()
