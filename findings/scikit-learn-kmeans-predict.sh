#!/usr/bin/env bash
# scikit-learn 1.9.1: KMeans.predict of the very float32 rows that it was fitted to gives other clusters than labels_, down to
# guessing, where rows lie at an offset.
#
# `fit` moves rows to their mean, so that inertia_, labels_ and cluster_centers_ are right at any offset. `predict` and `score`
# do not: |c|^2 - 2 x c in float32 has no digits left of the distances. Fifty columns at an offset of 10,000, whose spacing in
# float32 is 0.001, are enough. What a pipeline, or a saved model, assigns is then wrong, while all that the fit reports is
# perfect. `transform` computes its distances in float64 and is right. MiniBatchKMeans does not centre in its fit either.
#
# Do instead: float64 rows, or centre them; `transform(x).argmin(1)`.
#
# Seen (Python 3.11, x86-64; 3,000 rows in three far clusters; share of rows at their nearest centre):
#   offset     0: labels_ 1.00  predict 1.00  transform 1.00  score -150275  inertia 150275
#   offset 1e+04: labels_ 1.00  predict 0.79  transform 1.00  score -594950  inertia 150275
#   offset 1e+05: labels_ 1.00  predict 0.34  transform 1.00  score -1582234  inertia 150278
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from sklearn.cluster import KMeans

rng = np.random.default_rng(0)
cluster = np.arange(3000) % 3
rows = rng.normal(size=(3000, 50)) + rng.normal(scale=3, size=(3, 50))[cluster]
found = []
for offset in (0, 1e4, 1e5):
    x = (rows + offset).astype(np.float32)
    model = KMeans(3, n_init=3, random_state=0).fit(x)
    apart = x[:, None].astype(float) - model.cluster_centers_.astype(float)
    nearest = np.square(apart).sum(-1).argmin(1)
    guesses = model.labels_, model.predict(x), model.transform(x).argmin(1)
    right = [float(np.mean(guess == nearest)) for guess in guesses]
    found.append(right)
    print(f"offset {offset:5.0{'f' if not offset else 'e'}}: labels_ {right[0]:.2f}  predict {right[1]:.2f}  ", end="")
    print(f"transform {right[2]:.2f}  score {model.score(x):.0f}  inertia {model.inertia_:.0f}")
fit_is_right = all(right[0] > 0.999 and right[2] > 0.999 for right in found)
sys.exit(not (fit_is_right and found[0][1] > 0.999 and found[1][1] < 0.95 and found[2][1] < 0.5))
EOF
