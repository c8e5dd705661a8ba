#!/usr/bin/env bash
# safetensors 0.8.0: numpy arrays that are transposed, Fortran-ordered or strided are saved with their values scrambled.
#
# The bytes are written in the order of memory (or of the start of it), the shape is that of the view. `load` returns other
# numbers in the right shape and dtype, `save` says nothing. 0.7.0 wrote the right ones. A kernel from a Dense layer of
# another framework, saved as `w.T`, is exactly this.
#
# Do instead: `np.ascontiguousarray` on every leaf before saving, and read back once.
#
# Seen (Python 3.11, x86-64):
#   w.T                saved [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], loaded [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   asfortranarray(w)  saved [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], loaded [[0.0, 3.0, 1.0], [4.0, 2.0, 5.0]]
#   w[:, ::2]          saved [[0.0, 2.0], [3.0, 5.0]], loaded [[0.0, 1.0], [2.0, 3.0]]
#   ascontiguousarray(w.T): [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from safetensors.numpy import load, save

w = np.arange(6.0).reshape(2, 3)
wrong = []
for name, array in {"w.T": w.T, "asfortranarray(w)": np.asfortranarray(w), "w[:, ::2]": w[:, ::2]}.items():
    back = load(save({"w": array}))["w"]
    wrong.append(back.shape == array.shape and not np.array_equal(back, array))
    print(f"{name:18} saved {array.tolist()}, loaded {back.tolist()}")
right = load(save({"w": np.ascontiguousarray(w.T)}))["w"]
print("ascontiguousarray(w.T):", right.tolist())
sys.exit(not (all(wrong) and np.array_equal(right, w.T)))
EOF
