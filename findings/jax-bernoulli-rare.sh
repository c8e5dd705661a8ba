#!/usr/bin/env bash
# jax 0.10.2: jax.random.bernoulli with p of 1e-7, 1e-8 and 1e-9 fires equally often, about once in eight million.
#
# Float32 uniforms are multiples of 2**-23, and 0 is one of them: whatever p > 0, "uniform < p" holds at least for that one. An
# event of probability 1e-9 happens 120 times too often: as a rate of mutation, dropout of a molecule or a rare component it
# is another model. mode="low" is the default; jax.random.choice and categorical have modes as well. numpy draws 53 bits.
#
# Do instead: `mode="high"`.
#
# Seen (Python 3.11, x86-64):
#   p = 1e-07: 15 of 1e8 draws, expected 10.0
#   p = 1e-08: 15 of 1e8 draws, expected 1.0
#   p = 1e-09: 15 of 1e8 draws, expected 0.1
#   p = 1e-09, mode="high": 0
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

counts = {}
for p in (1e-7, 1e-8, 1e-9):
    draw = jax.jit(lambda key, p=p: jax.random.bernoulli(key, p, (10_000_000,)).sum())
    counts[p] = sum(int(draw(key)) for key in jax.random.split(jax.random.key(0), 10))
    print(f"p = {p}: {counts[p]} of 1e8 draws, expected {1e8 * p:.1f}")
high = jax.jit(lambda key: jax.random.bernoulli(key, 1e-9, (10_000_000,), mode="high").sum())
counts["high"] = sum(int(high(key)) for key in jax.random.split(jax.random.key(0), 10))
print(f'p = 1e-09, mode="high": {counts["high"]}')
sys.exit(not (5 <= counts[1e-9] <= 30 and counts[1e-9] == counts[1e-8] and counts["high"] <= 2))
EOF
