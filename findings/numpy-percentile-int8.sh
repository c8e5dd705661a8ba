#!/usr/bin/env bash
# numpy 2.4.6: np.percentile, np.quantile and np.nanpercentile of signed integers leave the range of the data: the 50th percentile of
# -100 and 100 in int8 is 128.0, where np.median is 0.0.
#
# Between two neighbours the gap is taken in the dtype of the data, where 100 + 100 is -56; the result is float64, so that nothing
# shows it. Of one column there is a RuntimeWarning, of a table with axis=0 none. It needs two neighbouring values that are
# further apart than the dtype's largest number: embeddings quantised to int8 have them at their ends and in small samples, int16
# and int32 columns where a few values are far out. Unsigned integers are right.
#
# Do instead: x.astype(float) first.
#
# Seen (Python 3.11, x86-64; of two columns, axis=0):
#   int8  [-100, 100] percentile 50: [128.0, 128.0], median [0.0, 0.0]
#   int16 [-30000, 30000] percentile 50: [32768.0, 32768.0], median [0.0, 0.0]
#   int32 [-2000000000, 2000000000] percentile 50: [2147483648.0, 2147483648.0], median [0.0, 0.0]
#   int8  [-128, 127] quantiles .25, .5: [-128.25, 127.5], true [-64.25, -0.5]
#   uint8 [0, 200] percentile 50: 100.0
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

warnings.simplefilter("error")  # there is none
found = []
for dtype, values in ((np.int8, [-100, 100]), (np.int16, [-30_000, 30_000]), (np.int32, [-2_000_000_000, 2_000_000_000])):
    x = np.array([values, values], dtype).T
    found.append((np.percentile(x, 50, axis=0).tolist(), np.median(x, axis=0).tolist()))
    print(f"{x.dtype.name:5} {values} percentile 50: {found[-1][0]}, median {found[-1][1]}")
x = np.array([[-128, 127]] * 2, np.int8).T
quarters = np.quantile(x, [0.25, 0.5], axis=0)[:, 0].tolist()
true = np.quantile(x.astype(float), [0.25, 0.5], axis=0)[:, 0].tolist()
print(f"int8  [-128, 127] quantiles .25, .5: {quarters}, true {true}")
unsigned = float(np.percentile(np.array([0, 200], np.uint8), 50))
print(f"uint8 [0, 200] percentile 50: {unsigned}")
signed = found[0] == ([128, 128], [0, 0]) and min(found[1][0]) > 30_000
sys.exit(not (signed and quarters == [-128.25, 127.5] and unsigned == 100))
EOF
