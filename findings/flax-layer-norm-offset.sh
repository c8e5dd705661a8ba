#!/usr/bin/env bash
# flax 0.12.8: LayerNorm and BatchNorm return features of standard deviation 300 and more in place of 1, where the inputs have
# an offset of 3,000 standard deviations.
#
# Variances are mean(x**2) - mean(x)**2 in float32 (use_fast_variance=True, the default of linen and nnx). With an offset, rounding
# is left, cut at 0, and the division is by the square root of epsilon: what should be normalised is multiplied by 1,000
# (LayerNorm, epsilon 1e-6) or 300 (BatchNorm, 1e-5), in the rows and columns that happen to be cut. jax.nn.standardize is the same.
# Raw intensities, times in seconds or coordinates do this in the first layer.
#
# Do instead: `use_fast_variance=False`, or subtract a constant before the first layer.
#
# Seen (Python 3.11, x86-64):
#   offset     0, largest standard deviation: LayerNorm 1.0 BatchNorm 1.0; use_fast_variance=False 1.0 1.0
#   offset   100, largest standard deviation: LayerNorm 1.0 BatchNorm 1.0; use_fast_variance=False 1.0 1.0
#   offset  1000, largest standard deviation: LayerNorm 1.2 BatchNorm 1.1; use_fast_variance=False 1.0 1.0
#   offset  3000, largest standard deviation: LayerNorm 1246.1 BatchNorm 332.2; use_fast_variance=False 1.0 1.0
#   offset 10000, largest standard deviation: LayerNorm 1470.2 BatchNorm 332.3; use_fast_variance=False 1.0 1.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 flax==0.12.8 optax==0.2.8 orbax-checkpoint==0.12.8 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import flax.linen as nn
import jax
import numpy as np

x = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
worst = {}
for offset in (0, 100, 1000, 3000, 10000):
    for fast in (True, False):
        layers = nn.LayerNorm(use_fast_variance=fast), nn.BatchNorm(use_running_average=False, use_fast_variance=fast)
        for layer, axis in zip(layers, (1, 0)):
            out, _ = layer.init_with_output(jax.random.key(0), x + np.float32(offset))
            worst[offset, fast, axis] = float(np.asarray(out).std(axis).max())
    print(f"offset {offset:5}, largest standard deviation: LayerNorm {worst[offset, True, 1]:.1f}",
          f"BatchNorm {worst[offset, True, 0]:.1f}; use_fast_variance=False {worst[offset, False, 1]:.1f}",
          f"{worst[offset, False, 0]:.1f}")
sys.exit(not (worst[3000, True, 1] > 100 and worst[10000, True, 0] > 100 and worst[10000, False, 1] < 1.1))
EOF
