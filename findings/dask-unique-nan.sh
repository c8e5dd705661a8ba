#!/usr/bin/env bash
# dask 2026.8.0: da.unique(return_counts=True) counts NaN 0 times, and return_inverse gives NaN the number of another value.
#
# Counts and inverses of chunks are put together by `==`, which NaN does not fulfil. The values are right, and NaN is among them, so
# that nothing looks amiss: a column's missing entries are counted as none. numpy counts them, and so does dask without counts.
#
# Do instead: np.unique of the computed array, or da.isnan(x).sum() beside it.
#
# Seen (Python 3.11, x86-64; [1, nan, nan, 2, nan] in chunks of two):
#   values  numpy [1.0, 2.0, nan]  dask [1.0, 2.0, nan]
#   counts  numpy [1, 1, 3]  dask [1, 1, 0]
#   inverse numpy [0, 2, 2, 1, 2]  dask [0, 0, 0, 1, 0]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    dask[array]==2026.8.0 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import dask.array as da
import numpy as np

x = np.array([1, np.nan, np.nan, 2, np.nan])
want = np.unique(x, return_counts=True, return_inverse=True)
found = [part.compute() for part in da.unique(da.from_array(x, chunks=2), return_counts=True, return_inverse=True)]
for name, place in (("values ", 0), ("counts ", 2), ("inverse", 1)):
    print(f"{name} numpy {want[place].tolist()}  dask {found[place].tolist()}")
same = np.array_equal(want[0], found[0], equal_nan=True)
sys.exit(not (same and found[2].tolist() == [1, 1, 0] and found[1].tolist() != want[1].tolist()))
EOF
