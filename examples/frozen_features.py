"""Clusters of features that are given: rows of a pretrained encoder, which is not touched.

In place of a large encoder, a small network is taught to recognise the digits 0 to 4, and its hidden layer describes
images of 5 to 9, which it has never seen. `--features FILE.npy` takes rows (N, D) of your own encoder instead. The
number of factors is that of the least BIC, and the model goes into one file, which numpy alone can score.

    python examples/frozen_features.py
    python examples/frozen_features.py --features embeddings.npy --clusters 20
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from flax_hmog import AnalyticHMoG, PseudoCounts, fit_em, infer, load, save
from flax_hmog.analysis import clustering_metrics, information_criteria


def features_of_new_classes() -> tuple[np.ndarray, np.ndarray]:
    """Hidden activations (N, 64) of images of unseen classes, and their labels."""
    digits = load_digits()
    x, is_known = digits.data / 16, digits.target < 5
    network = MLPClassifier((64,), max_iter=100, tol=1e-3, random_state=0).fit(x[is_known], digits.target[is_known])
    hidden = np.maximum(x[~is_known] @ network.coefs_[0] + network.intercepts_[0], 0)
    return hidden.astype(np.float32), digits.target[~is_known]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, choose, save, load, and look at the clusters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="rows (N, D) as .npy")
    parser.add_argument("--labels", type=Path, help="classes (N,) as .npy, for scores only")
    parser.add_argument("--clusters", type=int, default=5)
    parser.add_argument("--factors", type=int, nargs="+", default=[8, 16, 32], help="numbers that are compared")
    parser.add_argument("--max-steps", type=int, default=100)
    options = parser.parse_args(arguments)

    x, labels = features_of_new_classes() if options.features is None else (np.load(options.features), None)
    if options.labels is not None:
        labels = np.load(options.labels)

    # units of a network that hardly ever fire have nearly no noise: this holds it up
    prior = PseudoCounts(noise_share=0.05)
    fits = {}
    for n_factors in options.factors:
        head = AnalyticHMoG(lat_dim=n_factors, n_components=options.clusters)
        fit = fit_em(head, x, jax.random.key(0), regularizer=prior, max_steps=options.max_steps)
        fits[n_factors] = information_criteria(fit.natural, x).bic, fit
        print(f"{n_factors} factors: BIC {fits[n_factors][0]:.0f} (less is better)")
    best, (_, fit) = min(fits.items(), key=lambda item: item[1][0])

    path = Path(tempfile.mkdtemp()) / "model.npz"
    save(fit, path, notes={"features": str(options.features), "factors": best})
    model = load(path)  # here, or where features are made
    output = infer(model.natural, x)
    clusters = np.asarray(output.log_responsibilities.argmax(axis=-1))
    certainty = np.exp(output.log_responsibilities.max(axis=-1))
    print(
        f"{best} factors; sizes {np.bincount(clusters, minlength=options.clusters)}, certainty {certainty.mean():.3f}"
    )
    if labels is not None:
        print("clusters:", clustering_metrics(labels, clusters))
        print(
            "k-means: ", clustering_metrics(labels, KMeans(options.clusters, n_init=3, random_state=0).fit_predict(x))
        )
    unusual = np.argsort(output.log_density)[:5]
    print("rows that are most unlike the others:", unusual.tolist())


if __name__ == "__main__":
    main()
