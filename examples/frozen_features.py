"""Clusters of features that are given: rows of a pretrained encoder, which is not touched.

In place of a large encoder, a small network is taught to recognise the digits 0 to 4, and its hidden layer describes
images of 5 to 9, which it has never seen. `--features FILE.npy` takes rows (N, D) of your own encoder instead.

    python examples/frozen_features.py
    python examples/frozen_features.py --features embeddings.npy --clusters 20
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from flax_hmog.analysis import clustering_metrics
from flax_hmog.recipe import fit_features


def features_of_new_classes() -> tuple[np.ndarray, np.ndarray]:
    """Hidden activations (N, 64) of images of unseen classes, and their labels."""
    digits = load_digits()
    x, is_known = digits.data / 16, digits.target < 5
    network = MLPClassifier((64,), max_iter=100, tol=1e-3, random_state=0).fit(x[is_known], digits.target[is_known])
    hidden = np.maximum(x[~is_known] @ network.coefs_[0] + network.intercepts_[0], 0)
    return hidden.astype(np.float32), digits.target[~is_known]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit four fifths of the rows, put the others into the clusters, and look at them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="rows (N, D) as .npy")
    parser.add_argument("--labels", type=Path, help="classes (N,) as .npy, for scores only")
    parser.add_argument("--clusters", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    x, labels = features_of_new_classes() if options.features is None else (np.load(options.features), None)
    if options.labels is not None:
        labels = np.load(options.labels)
    order = np.random.default_rng(options.seed).permutation(len(x))
    fitted, new = np.split(order, [len(x) * 4 // 5])

    found = fit_features(x[fitted], options.clusters, jax.random.key(options.seed))
    print("rows of each cluster:", np.bincount(found.assignments, minlength=options.clusters))
    probabilities = found(x[new])  # (new rows, clusters), one by one or in batches
    print("least certain of the new rows:", new[np.argsort(probabilities.max(axis=-1))[:5]].tolist())

    if labels is not None:
        print("rows of the fit:", clustering_metrics(labels[fitted], found.assignments))
        print("new rows:       ", clustering_metrics(labels[new], probabilities.argmax(axis=-1)))
        k_means = KMeans(options.clusters, n_init=3, random_state=options.seed).fit(x[fitted])
        print("k-means, new:   ", clustering_metrics(labels[new], k_means.predict(x[new])))


if __name__ == "__main__":
    main()
