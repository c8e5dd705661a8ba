"""Train an experiment: data, encoder (or none), exact EM, training by gradients, evaluation, checkpoints.

    python -m experiments.train digits [--workdir runs/digits] [--model.lat-dim 10] ...
    python -m experiments.train mnist --dry-run

Run again, it resumes where it stopped. Exit status 75: it was told to stop (SIGTERM) and has saved.
"""

import sys

# isort: split
from experiments.configs import EXPERIMENTS
from flax_hmog.recipe.train import train_command


def main() -> None:
    """Command line: the experiment's name, then its options."""
    names = ", ".join(EXPERIMENTS)
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\nExperiments: {names}.\nTheir options: python -m experiments.train NAME --help")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
        sys.exit(f"experiments.train: the first argument must be an experiment ({names}); got {sys.argv[1:2]}.")
    name = sys.argv[1]
    train_command(EXPERIMENTS[name], sys.argv[2:], f"python -m experiments.train {name}")


if __name__ == "__main__":
    main()
