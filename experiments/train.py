"""Train an experiment: data, encoder (or none), exact EM, training by gradients, evaluation, checkpoints.

    python -m experiments.train digits [--workdir runs/digits] [--model.lat-dim 10] ...
    python -m experiments.train mnist --dry-run

Run again, it resumes where it stopped. Exit status 75: it was asked to stop (SIGTERM) and has saved.
"""

import sys

from experiments.configs import EXPERIMENTS
from flax_hmog import cli


def main() -> None:
    """Command line: the experiment's name, then its options."""
    name, options = " ".join(sys.argv[1:2]), sys.argv[2:]
    if name in ("-h", "--help"):
        names = ", ".join(EXPERIMENTS)
        print(f"{__doc__}\nExperiments: {names}.\nTheir options: python -m experiments.train NAME --help")
    elif name not in EXPERIMENTS:
        names = ", ".join(EXPERIMENTS)
        sys.exit(f"experiments.train: the first argument must be an experiment ({names}); got {sys.argv[1:2]}.")
    else:
        sys.exit(cli.main(["train", name, *options], EXPERIMENTS, "python -m experiments.train"))


if __name__ == "__main__":
    main()
