"""Report on a finished run, from its checkpoints alone: `python -m experiments.analyze runs/digits`."""

import experiments

# isort: split
import tyro

import experiments.images  # noqa: F401  registers the image sets
from flax_hmog.recipe.report import main

if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.analyze")
