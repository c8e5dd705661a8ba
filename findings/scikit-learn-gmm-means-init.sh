#!/usr/bin/env bash
# scikit-learn 1.9.1: GaussianMixture(means_init=...) takes the means, but weights and covariances from k-means, in the
# numbering of k-means.
#
# k-means runs although means are given. Component 0 gets the weight and covariance of k-means cluster 0, wherever that is:
# the true mean of the tight cluster with the covariance of the wide one, and the reverse. Given the two true means, one order ends
# at the right maximum and the other 4 nats per row below, and which is which depends on `random_state`. Both say converged.
#
# Do instead: give `weights_init` and `precisions_init` along with `means_init`, in one order.
#
# Seen (Python 3.11, x86-64):
#   random_state=0: nats per row -6.816 -2.834 [True, True]
#      with weights and precisions, second order: -2.834
#   random_state=1: nats per row -2.834 -6.816 [True, True]
#      with weights and precisions, second order: -2.834
#   random_state=2: nats per row -2.834 -6.816 [True, True]
#      with weights and precisions, second order: -2.834
#   random_state=3: nats per row -6.816 -2.834 [True, True]
#      with weights and precisions, second order: -2.834
#   random_state=4: nats per row -6.816 -2.834 [True, True]
#      with weights and precisions, second order: -2.834
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from sklearn.mixture import GaussianMixture

rng = np.random.default_rng(0)
tight, wide = rng.normal(0, 0.1, (500, 2)), rng.normal(20, 5, (500, 2))
x = np.vstack([tight, wide])
means = np.array([[0.0, 0.0], [20.0, 20.0]])  # the true ones
worst = []
for seed in range(5):
    fits = [GaussianMixture(2, means_init=m, random_state=seed).fit(x) for m in (means, means[::-1])]
    worst.append(min(fit.score(x) for fit in fits))
    print(f"random_state={seed}: nats per row", *(f"{fit.score(x):6.3f}" for fit in fits), [f.converged_ for f in fits])
    known = dict(weights_init=[0.5, 0.5], precisions_init=[np.eye(2) / 25, np.eye(2) * 100])
    full = GaussianMixture(2, means_init=means[::-1], random_state=seed, **known).fit(x)
    print("   with weights and precisions, second order:", f"{full.score(x):6.3f}")
sys.exit(not (all(score < -5 for score in worst) and full.score(x) > -4))
EOF
