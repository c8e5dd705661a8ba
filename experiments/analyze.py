"""Report on a finished run, from its checkpoints alone: `python -m experiments.analyze runs/digits`."""

import sys

import experiments.images  # noqa: F401  registers the image sets
from flax_hmog.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
