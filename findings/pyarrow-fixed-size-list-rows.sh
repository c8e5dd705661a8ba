#!/usr/bin/env bash
# pyarrow 26.0.1: of a column of vectors (fixed-size lists), flatten() drops rows that are null, and .values of a slice is the
# whole parent: rows move to the labels of others.
#
# `flatten().to_numpy().reshape(-1, d)` of N rows with one null has N - 1 rows, and all rows after it are shifted by one.
# `.values` keeps them (as NaN) but ignores the slice: rows 3 and 4 give all five. Both are how one gets embeddings out of
# parquet without copies.
#
# Do instead: raise on `null_count`; take `flatten()` of slices, `.values` of whole arrays only, and compare lengths.
#
# Seen (Python 3.11, x86-64):
#   column:  [[0.0, 0.1], [1.0, 1.1], None, [3.0, 3.1], [4.0, 4.1]]
#   flatten: [[0.0, 0.1], [1.0, 1.1], [3.0, 3.1], [4.0, 4.1]]
#   slice [3:]: [[3.0, 3.1], [4.0, 4.1]]
#   its values: [[0.0, 0.1], [1.0, 1.1], [nan, nan], [3.0, 3.1], [4.0, 4.1]]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pyarrow==26.0.1 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import pyarrow as pa

column = pa.array([[0.0, 0.1], [1.0, 1.1], None, [3.0, 3.1], [4.0, 4.1]], pa.list_(pa.float64(), 2))
flat = column.flatten().to_numpy().reshape(-1, 2)
part = column[3:]
values = part.values.to_numpy(zero_copy_only=False).reshape(-1, 2)
print("column: ", column.to_pylist())
print("flatten:", flat.tolist())
print("slice [3:]:", part.to_pylist())
print("its values:", values.tolist())
sys.exit(not (flat.shape == (4, 2) and flat[2, 0] == 3 and len(part) == 2 and values.shape == (5, 2)))
EOF
