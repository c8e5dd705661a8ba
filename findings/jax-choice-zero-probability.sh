#!/usr/bin/env bash
# jax 0.10.2: jax.random.choice(replace=False, p=...) draws entries of probability 0 once the others are used up.
#
# numpy raises ("Fewer non-zero entries in p than size"). jax sorts log p plus noise and returns the first ones: entries at -inf
# come last, in their order, and are returned as if they had been drawn. Seeding by squared distances (k-means++) on rows
# with fewer distinct values than clusters then returns rows that are already taken.
#
# Do instead: check `(p > 0).sum() >= size` before.
#
# Seen (Python 3.11, x86-64):
#   p = [0.5, 0.5, 0.0, 0.0, 0.0]  jax: [[1, 0, 2, 3], [1, 0, 2, 3], [1, 0, 2, 3], [1, 0, 2, 3]]
#   numpy: ValueError: Fewer non-zero entries in p than size
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

p = [0.5, 0.5, 0.0, 0.0, 0.0]
drawn = [jax.random.choice(jax.random.key(s), 5, (4,), replace=False, p=jnp.array(p)).tolist() for s in range(4)]
print("p =", p, " jax:", drawn)
try:
    print("numpy:", np.random.default_rng(0).choice(5, 4, replace=False, p=p))
    raised = False
except ValueError as error:
    print("numpy: ValueError:", error)
    raised = True
sys.exit(not (raised and all(sorted(d)[:2] == [0, 1] and max(d) > 1 for d in drawn)))
EOF
