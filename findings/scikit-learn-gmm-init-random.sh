#!/usr/bin/env bash
# scikit-learn 1.9.1: GaussianMixture(init_params="random") converges to one cluster, whatever the seed and the data.
#
# Each row starts with independent random responsibilities for all components, so every component starts as the average of
# all rows, with means equal up to chance. Gains of the first steps are below the default `tol`: two clusters 20 standard
# deviations apart are not found, after 2 iterations, `converged_` is True, no warning; 20 restarts do not help.
#
# Do instead: "kmeans" (the default) or "k-means++"; "random_from_data" for starts that differ.
#
# Seen (Python 3.11, x86-64):
#   kmeans: -3.483 nats per row
#   random: -5.459, means [[9.9, 10.0], [10.0, 10.1]], 2 steps, True
#   random: -5.459, means [[10.1, 10.1], [9.8, 9.9]], 2 steps, True
#   random: -5.459, means [[9.9, 10.0], [9.9, 10.0]], 2 steps, True
#   random: -5.459, means [[10.1, 10.2], [9.8, 9.8]], 2 steps, True
#   random: -5.459, means [[9.7, 9.7], [10.2, 10.3]], 2 steps, True
#   random, n_init=20: -5.459
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys
import warnings

import numpy as np
from sklearn.mixture import GaussianMixture

warnings.simplefilter("error")
rng = np.random.default_rng(0)
x = np.vstack([rng.normal(0, 1, (300, 2)), rng.normal(20, 1, (300, 2))])
truth = GaussianMixture(2, random_state=0).fit(x)
print(f"kmeans: {truth.score(x):.3f} nats per row")
fits = [GaussianMixture(2, init_params="random", random_state=seed).fit(x) for seed in range(5)]
for fit in fits:
    print(f"random: {fit.score(x):.3f}, means {fit.means_.round(1).tolist()}, {fit.n_iter_} steps, {fit.converged_}")
many = GaussianMixture(2, init_params="random", n_init=20, random_state=0).fit(x)
print(f"random, n_init=20: {many.score(x):.3f}")
low = [fit.score(x) < truth.score(x) - 1.5 and fit.converged_ for fit in [*fits, many]]
sys.exit(not all(low))
EOF
