#!/usr/bin/env bash
# scikit-learn 1.9.1: davies_bouldin_score is 0.0, the best there is, for any labels, where distances are small numbers.
#
# The index is a ratio and should not depend on units. It returns 0.0 where all distances within clusters *or* all between
# centres are `np.allclose` to 0, that is below 1e-8: for lengths of nanometres in metres, good labels and shuffled ones are
# both perfect. silhouette_score and calinski_harabasz_score do not change. Selecting K by the smallest index then picks anything.
#
# Do instead: divide the rows by their standard deviation before scoring.
#
# Seen (Python 3.11, x86-64):
#   unit     1: true labels 0.298, shuffled 10.867 (silhouettes 0.789, 0.001)
#   unit 1e-08: true labels 0.298, shuffled 0.000 (silhouettes 0.789, 0.001)
#   unit 1e-09: true labels 0.000, shuffled 0.000 (silhouettes 0.789, 0.001)
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
from sklearn.metrics import davies_bouldin_score, silhouette_score

warnings.simplefilter("error")
rng = np.random.default_rng(0)
x, labels = np.vstack([rng.normal(0, 1, (100, 2)), rng.normal(6, 1, (100, 2))]), np.repeat([0, 1], 100)
shuffled = rng.permutation(labels)
scores = {}
for unit in (1, 1e-8, 1e-9):
    scores[unit] = [davies_bouldin_score(x * unit, y) for y in (labels, shuffled)]
    print(f"unit {unit:5}: true labels {scores[unit][0]:.3f}, shuffled {scores[unit][1]:.3f}",
          f"(silhouettes {silhouette_score(x * unit, labels):.3f}, {silhouette_score(x * unit, shuffled):.3f})")
sys.exit(not (scores[1][0] > 0.1 and scores[1e-8][1] == 0 and scores[1e-9] == [0, 0]))
EOF
