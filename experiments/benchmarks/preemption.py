"""Runs that are stopped at random moments end as one that was not, bit for bit.

    python -m experiments.benchmarks.preemption [--count 20] [--per-run 5] [--in-saves]

For SIGTERM and kill -9, in EM and in training by gradients: a run is interrupted `per_run` times at random moments of
that stage, or while it saves, and started again each time, until `count` interruptions have been made. Then every
array, position and metric of its last checkpoints, and every line of metrics.jsonl but for times, is compared with an
uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from flax_hmog.training import restore
from flax_hmog.training.files import UNFINISHED
from flax_hmog.training.logs import Stage
from flax_hmog.training.processes import STOPPED

STAGES = ("em", "differentiable")
SIGNALS = {"SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}
# stages of a few seconds that save often, so that interruptions also fall into saves
OPTIONS = [
    *("synthetic", "--em.n-restarts", "12", "--em.max-steps", "60", "--em.tolerance", "1e-12"),
    *("--checkpoints.em-steps", "5", "--gradient.epochs", "20", "--gradient.batch-size", "32"),
    *("--checkpoints.gradient-steps", "100"),
]
TIMES = ("seconds", "samples_per_second")
WINDOW = 3.0  # seconds of a stage in which it is interrupted


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of the interruptions of one kind.

    Attributes:
        stage: the interrupted stage.
        signal: what interrupted it.
        interruptions: how many there were.
        unfinished: how many of them left a save that was not finished.
        runs: in how many runs.
        equal: how many of the runs ended as the uninterrupted one.
    """

    stage: str
    signal: str
    interruptions: int
    unfinished: int
    runs: int
    equal: int


def main(count: int = 20, per_run: int = 5, in_saves: bool = False) -> None:
    """Interrupt and compare.

    Args:
        count: interruptions of each kind.
        per_run: interruptions of a run before it is left to end.
        in_saves: interrupt while a checkpoint is written.
    """
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.print(table_of(measure(Path(folder), count, per_run, in_saves=in_saves)))
    console.print(f"seed of the moments 0; jax {jax.__version__}, Python {sys.version.split()[0]}")


def table_of(outcomes: list[Outcome]) -> Table:
    """One row for each outcome."""
    table = Table("stage", "signal", "interruptions", "left a save unfinished", "runs", "bit for bit equal")
    for outcome in outcomes:
        table.add_row(*(str(value) for value in dataclasses.astuple(outcome)))
    return table


def measure(folder: Path, count: int, per_run: int, *, in_saves: bool = False, seed: int = 0) -> list[Outcome]:
    """All outcomes."""
    rng, reference = random.Random(seed), folder / "reference"
    finish(start(reference))
    wanted, outcomes = fingerprint(reference), []
    for stage in STAGES:
        for name, number in SIGNALS.items():
            done = unfinished = runs = equal = 0
            while done < count:
                workdir = folder / f"{stage}-{number}-{runs}"
                some, left = interrupt(workdir, stage, number, min(per_run, count - done), rng, in_saves=in_saves)
                done, unfinished = done + some, unfinished + left
                runs, equal = runs + 1, equal + (fingerprint(workdir) == wanted)
            outcomes.append(Outcome(stage, name, done, unfinished, runs, equal))
    return outcomes


def start(workdir: Path, *options: str) -> subprocess.Popen:
    """The run in this folder, started or resumed."""
    command = [sys.executable, "-m", "experiments.train", *OPTIONS, "--workdir", str(workdir), *options]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=os.environ | cache, **quiet)  # type: ignore[call-overload]


def interrupt(
    workdir: Path, stage: str, number: int, count: int, rng: random.Random, *, in_saves: bool = False
) -> tuple[int, int]:
    """Interrupt a run that often in a stage, each time at a random moment or while it saves, then let it end.

    Returns:
        The number of interruptions (fewer, if the run was over before), and of saves that they left unfinished.
    """
    done = left = 0
    while done < count and interrupt_once(workdir, stage, number, rng.uniform(0, WINDOW / count), in_saves=in_saves):
        done, left = done + 1, left + bool(unfinished_saves(workdir, stage))
    finish(start(workdir))
    return done, left


def interrupt_once(workdir: Path, stage: str, number: int, seconds: float, *, in_saves: bool = False) -> bool:
    """Start or resume a run and interrupt it so long after its first new line of a stage, or in the next save.

    Returns:
        True if it was interrupted, False if it came to its end before.

    Raises:
        RuntimeError: if the run fails.
    """
    process, lines = start(workdir), stage_lines(workdir, stage)
    while process.poll() is None and stage_lines(workdir, stage) == lines:
        time.sleep(0.02)
    time.sleep(seconds)
    while in_saves and process.poll() is None and not unfinished_saves(workdir, stage):
        pass  # a save takes some hundredths of a second
    process.send_signal(number)
    return finish(process, STOPPED, -signal.SIGKILL) != 0


def finish(process: subprocess.Popen, *interrupted: int) -> int:
    """Wait for the end of a run: its exit status, 0 or one of these.

    Raises:
        RuntimeError: if it is another.
    """
    _, errors = process.communicate()
    if process.returncode not in (0, *interrupted):
        raise RuntimeError(f"the run ended with {process.returncode}: {errors.decode()[-2000:]}")
    return int(process.returncode)


def unfinished_saves(workdir: Path, stage: str) -> list[Path]:
    """Files of saves of a stage that are going on, or were interrupted."""
    return list((workdir / Stage(0, stage).folder).glob(f"*{UNFINISHED}*"))


def stage_lines(workdir: Path, stage: str) -> list[str]:
    """The lines of metrics of a stage."""
    path = workdir / "metrics.jsonl"
    return [line for line in path.read_text().splitlines() if f'"stage": "{stage}"' in line] if path.exists() else []


def fingerprint(workdir: Path) -> str:
    """Digest of everything that a finished run holds, but for times."""
    total = hashlib.sha256()
    for stage in STAGES:
        restored = restore(workdir / Stage(0, stage).folder)
        arrays = {"variables": restored.variables, "state": restored.state}
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
            total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        total.update(json.dumps([restored.step, restored.progress, restored.history, restored.metrics]).encode())
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = {name: value for name, value in json.loads(line).items() if name not in TIMES}
        total.update(json.dumps(record).encode())
    return total.hexdigest()


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.preemption")
