#!/usr/bin/env bash
# pandas 2.3.3: in a nullable Float64 column 0/0 gives NaN that is not missing: isna, fillna and dropna pass over it, and mean
# of the column is missing, though it says to skip what is missing.
#
# A column of Float64 can hold both NA and NaN. Division makes NaN; `isna()` is False for it, `fillna(0)` leaves it and
# `dropna()` keeps it. Counts divided by a total of 0 (an empty cell) are the usual source. float64 columns treat it as
# missing in all four places.
#
# Do instead: `x.astype("float64")` before cleaning, or `np.isnan` on the values.
#
# Seen (Python 3.11, x86-64):
#   float64: [nan, 0.5, 0.75], isna [True, False, False], fillna(0) [0.0, 0.5, 0.75], rows after dropna 2, mean 0.625
#   Float64: [nan, 0.5, 0.75], isna [False, False, False], fillna(0) [nan, 0.5, 0.75], rows after dropna 3, mean <NA>
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pandas==2.3.3 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
import pandas as pd

results = {}
for dtype in ("float64", "Float64"):
    share = pd.Series([0, 1, 3], dtype=dtype) / pd.Series([0, 2, 4], dtype=dtype)
    results[dtype] = [int(share.isna().sum()), int(np.isnan(share.fillna(0).to_numpy(float)).sum()), len(share.dropna())]
    print(f"{dtype}: {share.tolist()}, isna {share.isna().tolist()}, fillna(0) {share.fillna(0).tolist()},",
          f"rows after dropna {len(share.dropna())}, mean {share.mean()}")
sys.exit(results != {"float64": [1, 0, 2], "Float64": [0, 1, 3]})
EOF
