#!/usr/bin/env bash
# jax 0.10.2, CPU: jax.device_put(x, may_alias=False) of a memory map does not copy: what is written to the map later changes
# the jax array.
#
# Arrays of jax do not change, and may_alias=False is there to ask for a copy. On CPUs a numpy array whose memory is aligned to
# 64 bytes is taken over as it is, with and without the argument; one that is not aligned is copied. Rows mapped from a .npy
# file are aligned (its header has 128 bytes), small arrays only by chance: tests with small ones pass.
#
# The page says of may_alias: "If False, `x` will be copied" (jax-ml/jax issue 37830, open in 2026).
#
# Do instead: `x.copy()` first; reuse no buffer that went to device_put. (`jnp.array(x)` copies, but later: jax-array-copies-later.)
#
# Seen (Python 3.11, x86-64):
#   device_put                   sum before the write 0.0, after 8000.0
#   device_put, may_alias=False  sum before the write 0.0, after 8000.0
#   jnp.array                    sum before the write 0.0, after 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "rows.npy")
    np.save(path, np.zeros((1000, 8), np.float32))
    rows = np.load(path, mmap_mode="r+")
    ways = {
        "device_put": jax.device_put,
        "device_put, may_alias=False": lambda x: jax.device_put(x, may_alias=False),
        "jnp.array": jnp.array,
    }
    changed = []
    for name, way in ways.items():
        rows[:] = 0
        array = jax.block_until_ready(way(rows))
        before = float(array.sum())
        rows[:] = 1
        changed.append(before != float(array.sum()))
        print(f"{name:28} sum before the write {before}, after {float(array.sum())}")
    del rows, array
sys.exit(changed != [True, True, False])
EOF
