#!/usr/bin/env bash
# scikit-learn 1.9.1: IncrementalPCA's noise_variance_ is divided among the rows of the last batch: it is no estimate of
# anything, and falls towards 0 with many batches.
#
# Components and explained variances agree with PCA; `noise_variance_` (and with it `get_covariance` and `get_precision`) is
# built of the singular values of the last batch stacked under what was kept, of which the discarded part of all earlier
# batches is gone. Rows of unit noise in 2, 10 and 100 batches: 0.50, 0.10, 0.006 in place of 0.94.
#
# Do instead: (total variance of the rows - sum of explained_variance_) / (D - n_components).
#
# Seen (Python 3.11, x86-64):
#   PCA: 0.941
#     1 batches: noise_variance_ 0.941, by the difference of variances 0.941
#     2 batches: noise_variance_ 0.502, by the difference of variances 0.955
#    10 batches: noise_variance_ 0.097, by the difference of variances 0.979
#   100 batches: noise_variance_ 0.006, by the difference of variances 0.983
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from sklearn.decomposition import PCA, IncrementalPCA

x = np.random.default_rng(0).normal(size=(1000, 10))
truth = PCA(3).fit(x).noise_variance_
print(f"PCA: {truth:.3f}")
noise = {}
for batches in (1, 2, 10, 100):
    fit = IncrementalPCA(3)
    for batch in np.array_split(x, batches):
        fit.partial_fit(batch)
    noise[batches] = fit.noise_variance_
    again = (fit.var_.sum() * 1000 / 999 - fit.explained_variance_.sum()) / 7
    print(f"{batches:3} batches: noise_variance_ {noise[batches]:.3f}, by the difference of variances {again:.3f}")
sys.exit(not (abs(noise[1] - truth) < 0.01 and noise[10] < 0.3 * truth and noise[100] < 0.03 * truth))
EOF
