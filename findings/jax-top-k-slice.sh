#!/usr/bin/env bash
# jax 0.10.2, CPU: a slice of what jax.lax.top_k returns makes the compiled program sort every row, tens of times slower.
#
# top_k(x, 8) of rows of 1,000 runs as a selection. With `values[:, -1:]` or `values[:, 0]` behind it, as for a threshold or
# the best alone, XLA moves the slice into the selection, no longer knows it as one, and sorts all of the row. Asking for less
# costs more. jax 0.12.0 sorts as well, in the time of the selection.
#
# Do instead: reduce in place of slicing (jnp.min(values, axis=-1) is the last one, jnp.max the first).
#
# Seen (Python 3.11, x86-64; 4,096 rows of 1,000, times vary):
#   top_k                     selection     sorts: False
#   top_k, then [:, -1:]      no selection  sorts: True  30 to 55 times as slow
#   top_k, then jnp.min       selection     sorts: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys
import time

import jax
import jax.numpy as jnp

x = jax.random.normal(jax.random.key(0), (4096, 1000))
calls = {
    "top_k": lambda v, i: (v, i),
    "top_k, then [:, -1:]": lambda v, i: (v[:, -1:], i),
    "top_k, then jnp.min": lambda v, i: (jnp.min(v, axis=-1, keepdims=True), i),
}
sorts, seconds, results = [], [], []
for name, then in calls.items():
    program = jax.jit(lambda x, then=then: then(*jax.lax.top_k(x, 8))).lower(x).compile()
    text = program.as_text()
    results.append(jax.block_until_ready(program(x))[0])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(program(x))
        times.append(time.perf_counter() - start)
    sorts.append(" sort(" in text)
    seconds.append(min(times))
    print(f"{name:25s} {'selection' if 'topk' in text.lower() else 'no selection':13s} sorts: {sorts[-1]!s:8s}", end="")
    print(f" {seconds[-1] / seconds[0]:.0f}x as slow" if seconds[-1] > 3 * seconds[0] else "")
same = bool((results[1] == results[2]).all())
sys.exit(not (sorts == [False, True, False] and same and seconds[1] > 3 * seconds[2]))
EOF
