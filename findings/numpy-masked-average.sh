#!/usr/bin/env bash
# numpy 2.4.6: np.mean of a masked array leaves masked entries out, np.average with equal weights counts them as zeros.
#
# np.average multiplies and sums (masked entries contribute nothing) and divides by the sum of *all* weights: [2, --] has mean
# 2 and average 1. A weighted mean of columns with gaps, the M-step of any mixture, shrinks towards 0 with the share of gaps.
# np.cov reads what is under the mask. No warning; all three return plain numbers.
#
# Do instead: `np.ma.average` and `np.ma.cov`, or fill with NaN and weigh by hand.
#
# Seen (Python 3.11, x86-64):
#   x = [2.0 2.0 2.0 --]
#   np.mean 2.0  np.average 1.5  np.ma.average 2.0
#   np.var 0.0  np.cov 250500.25  np.ma.cov 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys
import warnings

import numpy as np

warnings.simplefilter("error")
x = np.ma.masked_equal([2.0, 2.0, 2.0, -999.0], -999.0)
weights = np.ones(4)
print("x =", x)
print("np.mean", np.mean(x), " np.average", np.average(x, weights=weights), " np.ma.average", np.ma.average(x, weights=weights))
print("np.var", np.var(x), " np.cov", np.cov(x), " np.ma.cov", np.ma.cov(x))
sys.exit(not (np.mean(x) == 2 and np.average(x, weights=weights) == 1.5 and np.cov(x) > 1e5))
EOF
