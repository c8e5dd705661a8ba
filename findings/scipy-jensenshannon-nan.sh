#!/usr/bin/env bash
# scipy 1.17.1: distance.jensenshannon of two distributions that nearly agree is NaN in two of five cases.
#
# The divergence is a sum of terms of both signs that cancel, rounding leaves it at -1e-17 as often as at 1e-17, and the root is
# taken of that. So the distance between assignments of a model before and after saving, or in float32 and float64, is NaN just
# where they agree, and a mean over rows is NaN. cdist(metric="jensenshannon") does the same, without numpy's RuntimeWarning.
#
# Do instead: np.sqrt(np.maximum(rel_entr(p, m).sum() + rel_entr(q, m).sum(), 0) / 2) with m = (p + q) / 2: 0 below about 1e-8.
#
# Seen (Python 3.11, x86-64; 2,000 pairs of five probabilities that differ by so much, relatively):
#   1e-05: NaN in    0 of 2,000
#   1e-08: NaN in  790 of 2,000
#   1e-12: NaN in  957 of 2,000
#   [0.5, 0.5] and [0.5, 0.500000001]: nan, by cdist nan
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scipy==1.17.1 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from scipy.spatial.distance import cdist, jensenshannon

np.seterr(all="ignore")
rng, counts = np.random.default_rng(0), []
for apart in (1e-5, 1e-8, 1e-12):
    p = rng.dirichlet(np.ones(5), size=2000)
    q = p * (1 + apart * rng.normal(size=p.shape))
    q /= q.sum(axis=1, keepdims=True)
    counts.append(sum(bool(np.isnan(jensenshannon(*pair))) for pair in zip(p, q, strict=True)))
    print(f"{apart:.0e}: NaN in {counts[-1]:4d} of 2,000")
p, q = [0.5, 0.5], [0.5, 0.500000001]
two = float(jensenshannon(p, q)), float(cdist([p], [q], "jensenshannon")[0, 0])
print(f"[0.5, 0.5] and [0.5, 0.500000001]: {two[0]}, by cdist {two[1]}")
sys.exit(not (counts[0] == 0 and min(counts[1:]) > 400 and np.isnan(two).all()))
EOF
