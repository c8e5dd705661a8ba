#!/usr/bin/env bash
# scikit-learn 1.9.1: StandardScaler gives negative variances, and leaves the columns unscaled, where a CSR matrix stores an
# entry in parts.
#
# The CSR format allows several entries at one place; their sum is the value, and scipy, `toarray` and means all say so.
# Counts of two lanes put side by side are such a matrix. Variances are taken from the squares of the stored parts: they come
# out negative, `scale_` is 1, and `transform` returns the columns as they were. A NumPy warning of a square root is all there is
# to see; VarianceThreshold on the same matrix says that no column varies.
#
# Do instead: `x.sum_duplicates()` before anything of scikit-learn sees the matrix.
#
# Seen (Python 3.11, x86-64):
#   means     dense [2.958 3.116 2.996] sparse [2.958 3.116 2.996]
#   variances dense [2.98  3.063 2.896] sparse [-2.652 -3.073 -2.78 ]
#   scale_    dense [1.726 1.75  1.702] sparse [1. 1. 1.]
#   variances after sum_duplicates [2.98  3.063 2.896]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
import scipy.sparse as sp
from sklearn.preprocessing import StandardScaler

counts = np.random.default_rng(0).poisson(3.0, (500, 3)).astype(float)
lanes = [np.floor(counts / 2), counts - np.floor(counts / 2)]  # both lanes, entries of a row side by side
data = np.hstack(lanes).ravel()
indices = np.tile(np.arange(3), 2 * len(counts))
indptr = np.arange(0, data.size + 1, 6)
x = sp.csr_array((data, indices, indptr), shape=counts.shape)
assert np.array_equal(x.toarray(), counts)

right, wrong = StandardScaler(with_mean=False).fit(counts), StandardScaler(with_mean=False).fit(x)
print("means     dense", right.mean_.round(3), "sparse", wrong.mean_.round(3))
print("variances dense", right.var_.round(3), "sparse", wrong.var_.round(3))
print("scale_    dense", right.scale_.round(3), "sparse", wrong.scale_.round(3))
x.sum_duplicates()
print("variances after sum_duplicates", StandardScaler(with_mean=False).fit(x).var_.round(3))
sys.exit(not ((wrong.var_ < 0).all() and (wrong.scale_ == 1).all()))
EOF
