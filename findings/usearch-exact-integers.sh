#!/usr/bin/env bash
# usearch 2.26.6: exact search over integer rows returns NaN distances and the first rows as neighbours.
#
# `search(x, queries, k, "l2sq", exact=True)` of int32, int64 or uint8 rows: keys 0, 1, 2 for every query, distances NaN, no
# error. The same numbers as float32 or int8 are right. Counts and codes come as such integers.
#
# Do instead: float32 rows, and a check that each row's first neighbour has distance 0.
#
# Seen (Python 3.11, x86-64):
#   float32  neighbours of rows 50 and 51: [[50, 65, 66], [51, 87, 34]], distances [[0.0, 883.0, 995.0], [0.0, 741.0, 1270.0]]
#   int8     neighbours of rows 50 and 51: [[50, 65, 66], [51, 87, 34]], distances [[0.0, 883.0, 995.0], [0.0, 741.0, 1270.0]]
#   uint8    neighbours of rows 50 and 51: [[0, 1, 2], [0, 1, 2]], distances [[nan, nan, nan], [nan, nan, nan]]
#   int32    neighbours of rows 50 and 51: [[0, 1, 2], [0, 1, 2]], distances [[nan, nan, nan], [nan, nan, nan]]
#   int64    neighbours of rows 50 and 51: [[0, 1, 2], [0, 1, 2]], distances [[nan, nan, nan], [nan, nan, nan]]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    usearch==2.26.6 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from usearch.index import search

x = np.random.default_rng(0).integers(0, 50, (100, 8))
wrong = {}
for dtype in ("float32", "int8", "uint8", "int32", "int64"):
    rows = x.astype(dtype)
    found = search(rows, rows[50:52], 3, "l2sq", exact=True)
    wrong[dtype] = bool(np.isnan(found.distances).all())
    print(f"{dtype:8} neighbours of rows 50 and 51: {found.keys.tolist()}, distances {found.distances.tolist()}")
sys.exit(wrong != {"float32": False, "int8": False, "uint8": True, "int32": True, "int64": True})
EOF
