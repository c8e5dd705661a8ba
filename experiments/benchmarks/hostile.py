"""Outcomes of damage and interruptions: restored right, or an error that names the place; never something else.

    python -m experiments.benchmarks.hostile                            # all tasks
    python -m experiments.benchmarks.hostile --tasks damage             # 20 s on 2 cores
    python -m experiments.benchmarks.hostile --tasks interruptions --interruptions 8
    python -m experiments.benchmarks.hostile --tasks fits --fits 300    # minutes, most of them compilation

`damage` changes single bits of a checkpoint and of an exported program, spread over all their files, and leaves out
whole files, one at a time; what is then restored is compared with what was saved, the description included.
`interruptions` stops and kills runs, half of them while they save, and compares what they end with (preemption.py).
`fits` fits unusual data, and counts the outcomes (hostile_fits.py).
Moments, files, bits and data follow from `--seed`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import orbax.checkpoint
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import hostile_fits, preemption
from flax_hmog import DifferentiableHMoG
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.training import (
    Affine,
    CheckpointError,
    CheckpointWriter,
    Preprocessing,
    Restored,
    export,
    load_program,
    restore,
    write_program,
)

OUTCOMES = ("restored right", "named error", "unnamed error", "silent wrong")
OBS_DIM, CLUSTERS = 8, [0, 1, 0]
TaskName = Literal["damage", "interruptions", "fits"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The trials.

    Attributes:
        tasks: names of `TASKS`.
        changes: single bits that are changed in turn.
        interruptions: how many in all: of both stages by both signals, half of them in saves.
        fits: how many.
        seed: of moments, files, bits and data.
    """

    tasks: tuple[TaskName, ...] = ("damage", "interruptions", "fits")
    changes: int = 1000
    interruptions: int = 40
    fits: int = 2000
    seed: int = 0


def main(config: Config) -> None:
    """Try, and print a table for each task."""
    console = Console()
    for name in config.tasks:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            table = TASKS[name](config, Path(folder))
        table.title = f"{name}, {time.perf_counter() - started:.0f} s"
        console.print(table)
    versions = f"jax {jax.__version__}, orbax-checkpoint {orbax.checkpoint.__version__}"
    console.print(f"seed {config.seed}; {versions}, Python {sys.version.split()[0]}")


def damage(config: Config, folder: Path) -> Table:
    """Outcomes of each kind of damage, to each kind of file."""
    checkpoint, program = folder / "checkpoint", folder / "program"
    save_checkpoint(checkpoint)
    write_program(export(restore(checkpoint)), program)
    paths = [*sorted(path for path in (checkpoint / "2").rglob("*") if path.is_file()), program]

    def outcome(path: Path) -> str:
        return outcome_of(load_program, contents_of_program, program) if path == program else of_checkpoint()

    def of_checkpoint() -> str:
        return outcome_of(restore, contents, checkpoint, folder=checkpoint / "2")

    wanted = {"checkpoint": contents(restore(checkpoint)), "program": contents_of_program(load_program(program))}

    def outcome_of(read: Callable, describe: Callable, path: Path, folder: Path | None = None) -> str:
        try:
            found = describe(read(path))
        except CheckpointError as error:
            return "named error" if str(folder or path) in str(error) else "unnamed error"
        except Exception:
            return "unnamed error"
        return "restored right" if found == wanted[path.name] else "silent wrong"

    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    slowest = 0.0
    for path, what in damages(paths, config.changes, random.Random(config.seed)):
        started = time.perf_counter()
        counts[file_kind(path, checkpoint / "2"), what][outcome(path)] += 1
        slowest = max(slowest, time.perf_counter() - started)
    table = Table("file", "damage", "tries", *OUTCOMES)
    for (kind, what), counter in sorted(counts.items()):
        table.add_row(kind, what, *(str(number) for number in (counter.total(), *(counter[name] for name in OUTCOMES))))
    total = sum(counts.values(), collections.Counter())
    table.add_section()
    table.add_row("all", "", *(str(number) for number in (total.total(), *(total[name] for name in OUTCOMES))))
    table.caption = f"{len(paths)} files; the slowest answer took {slowest:.2f} s"
    return table


def damages(paths: list[Path], changes: int, rng: random.Random) -> Iterator[tuple[Path, str]]:
    """Damage files in turn, say how, and mend each before the next is damaged."""
    filled = [path for path in paths if path.stat().st_size]
    for number in range(changes):
        path = filled[number % len(filled)]
        whole = path.read_bytes()
        position, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        yield path, "one bit"
        path.write_bytes(whole)
    for path in paths:
        whole = path.read_bytes()
        path.unlink()
        yield path, "missing"
        path.write_bytes(whole[: len(whole) // 2])
        yield path, "cut off"
        path.write_bytes(whole)


def save_checkpoint(folder: Path) -> None:
    """Two steps of a model with all that a checkpoint may hold."""
    x = np.random.default_rng(0).standard_normal((32, OBS_DIM)).astype(np.float32)
    preprocessing = Preprocessing((Affine.constant(OBS_DIM, offset=1.0, scale=2.0),), OBS_DIM)
    module = Clusterer(MLP(4, (8,), "batch"), DifferentiableHMoG(2, 3))
    parts: dict[str, Any] = {"head": module.head, "encoder": module.encoder, "preprocessing": preprocessing}
    with CheckpointWriter(folder, **parts, config={"seed": 0, "rates": [0.1, 1e-3]}, best="objective") as writer:
        for step in (1, 2):
            key = jax.random.key(step)
            writer.save(
                step,
                module.init(key, x),
                state={"key": key, "moments": np.random.default_rng(step).standard_normal((40, 50))},
                progress={"position": 17 * step, "loss": step / 3},
                history=[{"epoch": epoch, "nmi": epoch / 7} for epoch in range(step)],
                metrics={"objective": -1.0 / step},
                clusters=CLUSTERS,
            )


def contents(restored: Restored) -> dict[str, Any]:
    """All that a checkpoint says, down to the bit, and what its model answers."""
    preprocessing = restored.preprocessing
    trees = {
        "variables": restored.module_variables,
        "state": restored.state,
        "preprocessing": None if preprocessing is None else preprocessing.arrays(),
        "answer": restored(np.linspace(-2, 2, 3 * OBS_DIM, dtype=np.float32).reshape(3, OBS_DIM)),
    }
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}
    texts = ("step", "progress", "history", "metrics", "config", "versions")
    described = {name: json.dumps(getattr(restored, name)) for name in texts}
    modules = {"modules": repr((restored.head, restored.encoder, restored.clusters))}
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in arrays.items()} | described | modules


def contents_of_program(program: Any) -> bytes:
    """All of a program."""
    return bytes(program.exported.serialize())


def file_kind(path: Path, step: Path) -> str:
    """The part of a checkpoint that a file belongs to."""
    if not path.is_relative_to(step):
        return "exported program"
    part = path.relative_to(step).parts[0]
    return {"description": "description", "arrays": "arrays", "SHA256SUMS": "SHA256SUMS"}.get(part, "notes of orbax")


def interruptions(config: Config, folder: Path) -> Table:
    """Outcomes of `preemption.measure`, at random moments and in saves."""
    each = max(1, config.interruptions // (2 * len(preemption.STAGES) * len(preemption.SIGNALS)))
    outcomes = []
    for in_saves in (False, True):
        (part := folder / str(in_saves)).mkdir()
        outcomes += preemption.measure(part, each, min(each, 5), in_saves=in_saves, seed=config.seed)
        shutil.rmtree(part)
    return preemption.table_of(outcomes)


def fits(config: Config, folder: Path) -> Table:
    """Outcomes of fits of hostile data."""
    return hostile_fits.table_of(config.fits, config.seed)


TASKS: dict[TaskName, Callable[[Config, Path], Table]] = {
    "damage": damage,
    "interruptions": interruptions,
    "fits": fits,
}
"""Each makes its table in a folder of its own."""


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="tyro")
    main(tyro.cli(Config, description=__doc__))
