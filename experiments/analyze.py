"""Report on a finished run, from its checkpoints alone: `python -m experiments.analyze runs/digits`."""

import sys

from flax_hmog.cli import main

import experiments.images  # noqa: F401  registers the image sets

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
