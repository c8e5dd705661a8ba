"""Time EM, gradient steps and assignments beside the machine's own matrix products, and beside scikit-learn.

    python -m experiments.benchmarks                                     # three sizes, 3 minutes on 2 cores
    python -m experiments.benchmarks --sizes text --tasks em gradient    # 16 GB
    python -m experiments.benchmarks --sizes images --peers              # scikit-learn takes minutes there

Every measurement runs in its own process. The same command runs on CPU, GPU and TPU; the table names the device.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.sizes import SIZES


@dataclasses.dataclass(frozen=True)
class Config:
    """The measurements.

    Attributes:
        sizes: names of `sizes.SIZES`.
        tasks: EM step, gradient step, the same from the densities of rows, assignments.
        repeats: calls of which the median is taken.
        peers: time scikit-learn, too.
        out: JSON file to write.
    """

    sizes: tuple[str, ...] = ("images-small", "images", "genes")
    tasks: tuple[Literal["em", "gradient", "gradient-of-rows", "assign"], ...] = ("em", "gradient", "assign")
    repeats: int = 5
    peers: bool = False
    out: Path = Path("runs/benchmarks.json")


def main(config: Config) -> None:
    """Measure, print the table, write the JSON."""
    for name in config.sizes:
        if name not in SIZES:
            raise SystemExit(f"benchmarks: `--sizes` must be among {', '.join(SIZES)}; got {name}.")
    console, rows, peers = Console(), [], {}
    for name in config.sizes:
        for task in config.tasks:
            rows.append({"size": name, "task": task} | _child("measure", name, task, str(config.repeats)))
        if config.peers:
            peers[name] = _child("peers", name)
    console.print(_table(rows))
    for name, times in peers.items():
        console.print(f"scikit-learn at {name}: " + ", ".join(f"{key} {value:.2f} s" for key, value in times.items()))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m experiments.benchmarks", *sys.argv[1:]])
    config.out.write_text(json.dumps({"command": command, "rows": rows, "scikit-learn": peers}, indent=2) + "\n")
    console.print(f"written to {config.out}")


def _child(module: str, *arguments: str) -> dict[str, Any]:
    """Output of a measurement in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", f"experiments.benchmarks.{module}", *arguments], capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"benchmarks: {module} {' '.join(arguments)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{rows[0]['device']}, jax {rows[0]['versions']['jax']}, medians")
    sizes = dict.fromkeys(row["size"] for row in rows)
    table.caption = "(N, D, L, K): " + ", ".join(f"{name} {SIZES[name]}" for name in sizes)
    for column in ("size", "task", "seconds", "products", "ratio", "compile", "MB above data"):
        table.add_column(column, justify="left" if column in ("size", "task") else "right")
    for row in rows:
        table.add_row(
            row["size"],
            row["task"],
            f"{row['seconds']:.3f}",
            f"{sum(row['product_seconds']):.3f}",
            f"{100 * row['ratio']:.0f} %",
            f"{row['compile_seconds']:.1f} s",
            f"{row['peak_bytes_above_data'] / 2**20:.0f}",
        )
    return table


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="tyro")
    main(tyro.cli(Config, description=__doc__))
