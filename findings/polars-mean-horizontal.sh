#!/usr/bin/env bash
# polars 2.1.0: mean_horizontal of columns of pixels (UInt8) adds them modulo 256: the mean of 200 and 200 is 72.0.
#
# The sum over columns is taken in the columns' own dtype and divided as Float64, so that the result does not look like a byte.
# `mean` and `sum` down a column, list.mean, arr.mean and rolling_mean of the same values widen and are right; `sum_horizontal`
# is 144 and shows its dtype. Int32 columns wrap from 2**31 on. The rows with the largest means are those that suffer.
#
# Do instead: pl.mean_horizontal(pl.all().cast(pl.Float64)), or to_numpy().mean(axis=1).
#
# Seen (Python 3.11, x86-64):
#   mean_horizontal of UInt8 [200, 200] and [10, 20]: [72.0, 15.0]
#   to_numpy().mean(axis=1):                          [200.0, 15.0]
#   list.mean:                                        [200.0, 15.0]
#   mean down the column [200, 200]:                  200.0
#   mean_horizontal of Int32 [2e9, 2e9]:              [-147483648.0]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    polars==2.1.0 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import polars as pl

frame = pl.DataFrame({"a": [200, 10], "b": [200, 20]}, schema={"a": pl.UInt8, "b": pl.UInt8})
wide = pl.DataFrame({"a": [2_000_000_000], "b": [2_000_000_000]}, schema={"a": pl.Int32, "b": pl.Int32})
found = {
    "mean_horizontal of UInt8 [200, 200] and [10, 20]:": frame.mean_horizontal().to_list(),
    "to_numpy().mean(axis=1):": frame.to_numpy().mean(axis=1).tolist(),
    "list.mean:": frame.select(pl.concat_list("a", "b").list.mean()).to_series().to_list(),
    "mean down the column [200, 200]:": pl.Series([200, 200], dtype=pl.UInt8).mean(),
    "mean_horizontal of Int32 [2e9, 2e9]:": wide.mean_horizontal().to_list(),
}
for name, value in found.items():
    print(f"{name:49} {value}")
sys.exit(list(found.values()) != [[72.0, 15.0], [200.0, 15.0], [200.0, 15.0], 200.0, [-147483648.0]])
EOF
