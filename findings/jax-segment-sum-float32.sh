#!/usr/bin/env bash
# jax 0.10.2, CPU: counting rows per cluster by float32 segment_sum (or .at[].add) stops at 16,777,216, for good, and so does the
# product ones @ one_hot(...); jnp.sum, mean, cumsum, one_hot(...).T @ ones and one_hot(...).sum(0) are right.
#
# A scatter adds one after the other, and 2**24 + 1 is no float32; reductions add in a tree. The weight of the largest
# cluster of 33 million rows is half of what it should be, and jnp.bincount(weights=ones), a scatter too, agrees with the
# wrong one. jnp.bincount without weights counts in integers. The same happens earlier, gradually: sums of responsibilities of
# a cluster of a few million rows lose digits.
#
# A vector times a matrix is added row by row, too: with rows on the left, transposed, it is not.
#
# Do instead: one_hot(labels).T @ values, or sums per block of rows that are then added.
#
# Seen (Python 3.11, x86-64):
#   segment_sum        16,777,216
#   zeros.at[].add     16,777,216
#   bincount(weights=) 16,777,216
#   ones @ one_hot()   16,777,216
#   bincount           33,554,432
#   one_hot().T @ ones 33,554,432
#   sum                33,554,432
#   one_hot().sum(0)   33,554,432
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp

n = 2**25
ones, zeros = jnp.ones(n), jnp.zeros(n, int)
counts = {
    "segment_sum": jax.ops.segment_sum(ones, zeros, 1)[0],
    "zeros.at[].add": jnp.zeros(1).at[zeros].add(ones)[0],
    "bincount(weights=)": jnp.bincount(zeros, weights=ones, length=1)[0],
    "ones @ one_hot()": (ones @ jax.nn.one_hot(zeros, 2))[0],
    "bincount": jnp.bincount(zeros, length=1)[0],
    "one_hot().T @ ones": (jax.nn.one_hot(zeros, 2).T @ ones)[0],
    "sum": ones.sum(),
    "one_hot().sum(0)": jax.nn.one_hot(zeros, 1).sum(0)[0],
}
for name, count in counts.items():
    print(f"{name:18} {int(count):,}")
sys.exit([int(c) for c in counts.values()] != [2**24] * 4 + [2**25] * 4)
EOF
