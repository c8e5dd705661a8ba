#!/usr/bin/env bash
# scikit-learn 1.9.1: calinski_harabasz_score of a perfect clustering is 1.0, and of the next best one 29.3 or more.
#
# It is a ratio without an upper end, with the scatter within clusters as its denominator; where that is 0 the function returns 1.0
# in place of infinity, lower than most clusterings score at random. So a search for the largest score drops the right one where
# rows repeat: codes, counts, one-hot columns, few distinct profiles. Noise of 1e-9 makes it 1e19. silhouette_score is 1 there.
#
# Do instead: silhouette_score, or stop where as many clusters as distinct rows are reached.
#
# Seen (Python 3.11, x86-64; 30 copies each of three points):
#   three clusters, the points: 1.0
#   two clusters:               29.3
#   three, noise of 1e-9:       1.1e+19
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from sklearn.metrics import calinski_harabasz_score

points = np.repeat([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 30, axis=0)
three, two = np.repeat([0, 1, 2], 30), np.repeat([0, 1, 1], 30)
noise = 1e-9 * np.random.default_rng(0).normal(size=points.shape)
found = [float(calinski_harabasz_score(*pair)) for pair in ((points, three), (points, two), (points + noise, three))]
print(f"three clusters, the points: {found[0]}")
print(f"two clusters:               {found[1]:.1f}")
print(f"three, noise of 1e-9:       {found[2]:.1e}")
sys.exit(not (found[0] == 1 and found[1] > 29 and found[2] > 1e18))
EOF
