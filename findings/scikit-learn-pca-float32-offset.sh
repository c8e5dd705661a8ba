#!/usr/bin/env bash
# scikit-learn 1.9.1: PCA of float32 rows depends on their offset by default: at 1,000 the first variance is 18 times too
# large, at 10,000 650 times.
#
# For 1,000 columns or fewer and ten times as many rows "auto" is "covariance_eigh". It takes the products of raw rows and
# subtracts the mean afterwards, in the dtype of the rows; "full" subtracts first and is right. The first component is the
# direction of rounding. No warning.
#
# Do instead: subtract the mean (of float64) yourself, or `svd_solver="full"`, or float64.
#
# Seen (Python 3.11, x86-64):
#   offset     0: auto [1.04 0.91 0.8 ] full [1.04 0.91 0.8 ]
#   offset   100: auto [1.05 0.91 0.8 ] full [1.04 0.91 0.8 ]
#   offset  1000: auto [19.24  1.5   1.2 ] full [1.04 0.91 0.8 ]
#   offset 10000: auto [679.78 107.66  94.55] full [1.04 0.91 0.8 ]
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
from sklearn.decomposition import PCA

warnings.simplefilter("error")
scales = np.linspace(1, 0.1, 20)
rows = np.random.default_rng(0).normal(size=(2000, 20)) * scales
ratios = []
for offset in (0, 100, 1000, 10000):
    x = (rows + offset).astype(np.float32)
    auto, full = (PCA(3, svd_solver=solver).fit(x) for solver in ("auto", "full"))
    ratios.append(auto.explained_variance_[0] / full.explained_variance_[0])
    print(f"offset {offset:5}: auto", auto.explained_variance_.round(2), "full", full.explained_variance_.round(2))
sys.exit(not (abs(ratios[0] - 1) < 1e-3 and ratios[2] > 3 and ratios[3] > 100))
EOF
