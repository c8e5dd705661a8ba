"""Small runs of the training script, and what they write."""

import dataclasses
import json

from rich.console import Console

from experiments.configs import EXPERIMENTS
from flax_hmog.recipe import train
from flax_hmog.recipe.config import EM, Checkpoints, Gradient, Model

DIFFERENTIABLE = EXPERIMENTS["digits"].heads[:1]
SMALL = dataclasses.replace(
    EXPERIMENTS["digits"],
    model=Model(lat_dim=3, n_components=4, obs_rep="full"),
    em=EM(n_restarts=2, max_steps=4),
    gradient=Gradient(epochs=4, batch_size=256),
    n_seeds=2,
    checkpoints=Checkpoints(em_steps=3, gradient_steps=7),
)
TIMES = ("seconds", "samples_per_second")


class StopAt:
    """A request to stop after so many steps of the run, which stays made; or an end without a save."""

    def __init__(self, step, *, killed):
        self.left, self.received, self.killed = step, False, killed

    def is_made(self):
        self.left -= 1
        if self.killed and self.left == 0:
            raise InterruptedError
        self.received |= self.left == 0
        return self.received


def run(workdir, config=SMALL, stop_at=10**9, command=None, *, killed=False, **options):
    config = dataclasses.replace(config, workdir=str(workdir), **options)
    train.run(config, Console(quiet=True), StopAt(stop_at, killed=killed), command=command)


def read_metrics(folder, **wanted):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if wanted.items() <= record.items()]


def without_times(records):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]
