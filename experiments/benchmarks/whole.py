"""A whole fit in a process that has compiled nothing: start, compilation, EM, assignments and a merge to few clusters.

    python -m experiments.benchmarks.whole --images IMAGES.gz --labels LABELS.gz --steps 2
    PYTHONPATH=OTHER python experiments/benchmarks/whole.py --images IMAGES.gz --labels LABELS.gz --steps 30

prints the CPU-seconds of each part, the objective and how the clusters agree with the labels. It takes functions that
older versions have too, so that OTHER, a work tree of another commit, is measured by the same file.
"""

import argparse
import gzip
import os
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# isort: split
import jax
import numpy as np

from flax_hmog import AnalyticHMoG, PseudoCounts, fit_em, infer
from flax_hmog.analysis import clustering_metrics, merge_components

IMAGES_HEADER, LABELS_HEADER = 16, 8


def main() -> None:
    """Fit, merge, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--lat-dim", type=int, default=50)
    parser.add_argument("--n-components", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    x = read(args.images, IMAGES_HEADER).reshape(-1, 784).astype(np.float32) / 255
    labels = read(args.labels, LABELS_HEADER)
    times, begun = [("imports", time.process_time())], []
    result = fit_em(
        AnalyticHMoG(args.lat_dim, args.n_components), x, jax.random.key(args.seed), max_steps=args.steps,
        regularizer=PseudoCounts(noise=0.01 * len(x)), tolerance=-np.inf,
        on_step=lambda _: begun.append(time.process_time()),
    )  # fmt: skip
    times += [("until the first step's end", begun[0]), ("later steps", time.process_time())]
    log_responsibilities = np.asarray(infer(result.natural, x).log_responsibilities)
    times.append(("assignments", time.process_time()))
    merged = merge_components(log_responsibilities, args.clusters)
    times.append(("merge", time.process_time()))
    before = 0.0
    for name, at in times:
        print(f"{name}: {at - before:.1f}")
        before = at
    metrics = clustering_metrics(labels, merged[log_responsibilities.argmax(axis=1)])
    print(
        f"in all: {before:.1f} CPU-seconds, {args.steps} steps, objective {result.objective_history[-1]:.3f}, {metrics}"
    )


def read(path: Path, header: int) -> np.ndarray:
    """The bytes of a file of MNIST after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


if __name__ == "__main__":
    main()
