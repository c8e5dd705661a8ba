#!/usr/bin/env bash
# jax 0.10.2: a Python integer takes the dtype of the array that it meets, modulo 2**8 for labels of 8 bits: `labels < 200` is False
# for all int8 labels, and one_hot of uint8 labels over 300 classes has two ones in a row.
#
# numpy compares by value (True), and raises OverflowError in arithmetic. jnp has no such check under weak types: 300 beside
# uint8 is 44. So a range check of labels passes or fails by the bits; full_like, where, clip and .at[].set wrap in the same
# way; jax.nn.one_hot compares with arange(300) in the dtype of the labels, where 0 .. 43 come twice. jax 0.12.0.1 does the same.
#
# Do instead: labels.astype(jnp.int32) where labels come in.
#
# Seen (Python 3.11, x86-64):
#   int8 5 < 200:     jax False  numpy True
#   uint8 5 == 261:   jax True  numpy False
#   uint8 50 < 300:   jax False  numpy True
#   one_hot(uint8 5, 300): ones at [5, 261], sum 2.0
#   loss of perfect predictions, at most 50 a class: by one_hot 50.0, by take_along_axis 0.0
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
import numpy as np

found = []
for name, value, compare in (
    ("int8 5 < 200:", np.int8(5), lambda a: a < 200),
    ("uint8 5 == 261:", np.uint8(5), lambda a: a == 261),
    ("uint8 50 < 300:", np.uint8(50), lambda a: a < 300),
):
    array = np.array([value])
    found.append((bool(compare(jnp.asarray(array))[0]), bool(compare(array)[0])))
    print(f"{name:17} jax {found[-1][0]}  numpy {found[-1][1]}")
row = jax.nn.one_hot(jnp.array([5], jnp.uint8), 300)[0]
print(f"one_hot(uint8 5, 300): ones at {np.flatnonzero(row).tolist()}, sum {float(row.sum())}")
labels = jnp.array([5, 17], jnp.uint8)
is_class = labels.astype(jnp.int32)[:, None] == jnp.arange(300)
losses = jnp.where(is_class, 0.0, 50.0)
by_one_hot = float(jnp.mean(jnp.sum(jax.nn.one_hot(labels, 300) * losses, axis=1)))
by_index = float(jnp.mean(jnp.take_along_axis(losses, labels[:, None], axis=1)))
print(f"loss of perfect predictions, at most 50 a class: by one_hot {by_one_hot}, by take_along_axis {by_index}")
wrong = found == [(False, True), (True, False), (False, True)]
sys.exit(not (wrong and np.flatnonzero(row).tolist() == [5, 261] and by_one_hot == 50 and by_index == 0))
EOF
