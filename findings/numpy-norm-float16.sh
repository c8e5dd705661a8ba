#!/usr/bin/env bash
# numpy 2.4.6: np.linalg.norm of float16 embeddings is inf from a length of 256 on, though float16 reaches 65,504; rows that are
# divided by it are 0.
#
# Squares are added in float16, and 256 squared is more than it holds (a RuntimeWarning says overflow). np.mean adds float16 in
# float32, so that means are right. 768 columns of size 10 have a length of 277: all rows then lie at the origin, alike to each
# other, and every cosine is 0.
#
# Do instead: x.astype(np.float32) before any norm.
#
# Seen (Python 3.11, x86-64; three rows of 768 columns in float16):
#   norm of each row:     [inf, inf, inf], in float32 [276.9, 270.4, 286.4]
#   rows / norm, largest: 0.0
#   means of each row:    right
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

warnings.simplefilter("ignore", RuntimeWarning)  # overflow
rows = np.random.default_rng(0).normal(scale=10, size=(3, 768)).astype(np.float16)
norms, true = np.linalg.norm(rows, axis=1), np.linalg.norm(rows.astype(np.float32), axis=1)
unit = rows / norms[:, None]
print(f"norm of each row:     {norms.tolist()}, in float32 {[round(float(v), 1) for v in true]}")
print(f"rows / norm, largest: {float(np.abs(unit).max())}")
are_right = np.allclose(rows.mean(axis=1), rows.astype(np.float32).mean(axis=1), atol=0.01)
print(f"means of each row:    {'right' if are_right else 'wrong'}")
sys.exit(not (np.isinf(norms).all() and true.max() < 300 and np.abs(unit).max() == 0 and are_right))
EOF
