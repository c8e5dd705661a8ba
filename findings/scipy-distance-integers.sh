#!/usr/bin/env bash
# scipy 1.17.1: scipy.spatial.distance.euclidean(u, v) of rows of pixels (uint8) is not euclidean(v, u), nor the distance.
#
# The functions of two vectors subtract in the dtype that they are given: 0 - 1 is 255, and the square root of it is taken in
# float64, so that nothing in the result shows it. euclidean, cityblock, chebyshev, minkowski, seuclidean and mahalanobis do so;
# sqeuclidean, canberra and braycurtis do not, and euclidean is not the root of sqeuclidean. cdist and pdist of the same rows
# convert first and are right, so that a check of one by the other is the first to notice. Signed integers wrap as well.
#
# Do instead: cdist, or x.astype(float).
#
# Seen (Python 3.11, x86-64; u = [0, 0], v = [1, 2] in uint8):
#   euclidean    u, v: 359.918  v, u:   2.236  cdist:   2.236
#   cityblock    u, v: 509.000  v, u:   3.000  cdist:   3.000
#   chebyshev    u, v: 255.000  v, u:   2.000  cdist:   2.000
#   minkowski    u, v: 359.918  v, u:   2.236  cdist:   2.236
#   sqeuclidean  u, v:   5.000  v, u:   5.000  cdist:   5.000
#   int8, -100 and 100: euclidean 56, cdist 200
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scipy==1.17.1 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from scipy.spatial import distance

u, v = np.array([0, 0], np.uint8), np.array([1, 2], np.uint8)
found = {}
for name in ("euclidean", "cityblock", "chebyshev", "minkowski", "sqeuclidean"):
    between = getattr(distance, name)
    found[name] = float(between(u, v)), float(between(v, u)), float(distance.cdist([u], [v], name)[0, 0])
    print("{:12} u, v: {:7.3f}  v, u: {:7.3f}  cdist: {:7.3f}".format(name, *found[name]))
low, high = np.array([-100], np.int8), np.array([100], np.int8)
signed = float(distance.euclidean(low, high)), float(distance.cdist([low], [high])[0, 0])
print(f"int8, -100 and 100: euclidean {signed[0]:.0f}, cdist {signed[1]:.0f}")
wrong = [one != other == right for name, (one, other, right) in found.items() if name != "sqeuclidean"]
sys.exit(not (all(wrong) and found["sqeuclidean"] == (5, 5, 5) and signed == (56, 200)))
EOF
