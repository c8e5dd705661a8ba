#!/usr/bin/env bash
# jax 0.10.2: jax.random.truncated_normal of a range in the upper or lower tail gives a few values, or one, again and again.
#
# It inverts the distribution function in float32, which is 1 from 5.3 on: a normal truncated to 4 and above is a lattice that
# ends at float32's largest number, one truncated to (6, 8) is 7.9999995 in every draw. No warning, and no NaN: the draws stay
# within the bounds. Bounds of (-2, 2), those of initial weights, are fine. jax 0.12.0.1 does the same.
#
# Do instead: ndtri of a uniform probability on the side where it is small: -ndtri(u * ndtr(-a) + (1 - u) * ndtr(-b)).
#
# Seen (Python 3.11, x86-64; a million draws each; means of the truth by scipy in float64):
#   ( 4, inf)  mean        inf (true   4.2256)  largest 3.4e+38  different values  1063
#   ( 5, inf)  mean        inf (true   5.1865)  largest 3.4e+38  different values    10
#   ( 6,   8)  mean     8.0000 (true   6.1585)  largest 8.0e+00  different values     1
#   ( 6,   8)  mean     6.1584 by ndtri
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 scipy==1.17.1 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from scipy.stats import truncnorm

key, seen = jax.random.key(0), []
for low, high in ((4.0, jnp.inf), (5.0, jnp.inf), (6.0, 8.0)):
    draws = np.asarray(jax.random.truncated_normal(key, low, high, (1_000_000,)))
    with np.errstate(over="ignore"):
        mean, true = float(draws.mean()), float(truncnorm.mean(low, high))
    seen.append((mean, true, len(np.unique(draws))))
    print(f"({low:2.0f}, {high:3.0f})  mean {mean:10.4f} (true {true:8.4f})  ", end="")
    print(f"largest {draws.max():.1e}  different values {seen[-1][2]:5d}")
u = jax.random.uniform(key, (1_000_000,), minval=jnp.finfo(jnp.float32).tiny)
other = float(np.asarray(-ndtri(u * ndtr(-6.0) + (1 - u) * ndtr(-8.0)), float).mean())
print(f"( 6,   8)  mean {other:10.4f} by ndtri")
lost = [count < 2000 and not abs(mean - true) < 1 for mean, true, count in seen]
sys.exit(not (all(lost) and abs(other - seen[2][1]) < 0.001))
EOF
