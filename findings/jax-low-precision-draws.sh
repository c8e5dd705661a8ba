#!/usr/bin/env bash
# jax 0.10.2: draws in bfloat16 come from 128 numbers: categorical over equal logits prefers low classes a thousand times, no
# normal draw is beyond 2.9, and bernoulli of 0.001 fires eight times too often.
#
# jax.random.uniform fills in the 7 bits of bfloat16's fraction, and all other draws follow from it in the dtype of their
# arguments. Gumbel noise of 128 values has ties, and argmax takes the first of them: with 1,000 equal logits, as a network in
# mixed precision gives them, the first hundred classes take 55% of the draws and the last hundred 0.05%. The result does not
# tell: `categorical` gives integers in any case. Normal draws, and so flax's initial weights with param_dtype bfloat16, have a
# mean of -0.012, twelve standard errors. float16 is biased by a factor of 2. jax 0.12.0.1 does the same.
#
# Do instead: logits and probabilities .astype(jnp.float32) before drawing; normal draws in float32, then rounded.
#
# Seen (Python 3.11, x86-64):
#   categorical, shares of ten blocks of 100 equal classes:
#     bfloat16 [0.545 0.249 0.112 0.052 0.023 0.01  0.005 0.002 0.001 0.001]
#     float16  [0.151 0.135 0.121 0.111 0.102 0.093 0.082 0.075 0.067 0.063]
#     float32  [0.097 0.1   0.101 0.101 0.1   0.101 0.1   0.101 0.1   0.099]
#   normal, largest of a million: bfloat16 2.891, float32 4.65; different values in bfloat16: 128
#   mean of a million normal draws: bfloat16 -0.0121, float32 -0.0001
#   bernoulli(0.001): bfloat16 0.0077, float32 0.001
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

key = jax.random.key(0)
print("categorical, shares of ten blocks of 100 equal classes:")
shares = []
for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    drawn = np.asarray(jax.random.categorical(key, jnp.zeros(1000, dtype), shape=(100_000,)))
    shares.append(np.bincount(drawn, minlength=1000).reshape(10, 100).sum(1) / drawn.size)
    print(f"  {jnp.dtype(dtype).name:8}", shares[-1].round(3))
normals = [jax.random.normal(key, (1_000_000,), dtype).astype(jnp.float32) for dtype in (jnp.bfloat16, jnp.float32)]
largest = [float(jnp.abs(draws).max()) for draws in normals]
different = len(np.unique(np.asarray(normals[0])))
print(f"normal, largest of a million: bfloat16 {largest[0]:.4}, float32 {largest[1]:.3}; ", end="")
print(f"different values in bfloat16: {different}")
means = [float(draws.mean()) for draws in normals]
print(f"mean of a million normal draws: bfloat16 {means[0]:.4f}, float32 {means[1]:.4f}")
rates = [float(jax.random.bernoulli(key, jnp.full(1_000_000, 0.001, d)).mean()) for d in (jnp.bfloat16, jnp.float32)]
print(f"bernoulli(0.001): bfloat16 {rates[0]:.2g}, float32 {rates[1]:.1g}")
is_biased = shares[0][0] > 0.5 and shares[0][-1] < 0.002 and shares[1][0] > 2 * shares[1][-1]
is_fair = np.abs(shares[2] - 0.1).max() < 0.005
sys.exit(not (is_biased and is_fair and largest[0] < 3 < 4.5 < largest[1] and rates[0] > 0.005 and means[0] < -0.01))
EOF
