#!/usr/bin/env bash
# jax 0.10.2, CPU: a preset of jax.default_matmul_precision takes digits from float64 products, and leaves float32 ones alone.
#
# A preset names the arithmetic of float32 products, as F32_F32_F32 or BF16_BF16_F32. With 64-bit types enabled, float64
# operands are converted to it as well, and the result is called float64 again: it has the digits of float32, or of bfloat16.
# float32 operands in the same context are multiplied in full float32 on CPUs, so that the product in the wider type is the
# worse one. The settings without such names ("float32", "bfloat16", "tensorfloat32", "highest") leave float64 as it is.
#
# Do instead: precision=jax.lax.Precision.HIGHEST at float64 products, which no context changes.
#
# Seen (Python 3.11, x86-64; largest error of 256 x 512 by 512 x 128 standard normal entries):
#   highest            float32 6.9e-05  float64 1.1e-13
#   bfloat16           float32 6.9e-05  float64 1.1e-13
#   F32_F32_F32        float32 6.9e-05  float64 6.9e-05
#   BF16_BF16_F32_X6   float32 6.9e-05  float64 6.9e-05
#   BF16_BF16_F32      float32 6.9e-05  float64 2.3e-01
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu JAX_ENABLE_X64=1
"$work/venv/bin/python" - <<'EOF'
import sys

import jax
import numpy as np

rng = np.random.default_rng(0)
a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((256, 512), (512, 128)))
exact = a.astype(np.float64) @ b.astype(np.float64)
errors = {}
for name in ("highest", "bfloat16", "F32_F32_F32", "BF16_BF16_F32_X6", "BF16_BF16_F32"):
    found = []
    for dtype in (np.float32, np.float64):
        with jax.default_matmul_precision(name):
            product = jax.jit(lambda a, b: a @ b)(a.astype(dtype), b.astype(dtype))
        if product.dtype != dtype:
            sys.exit(f"{name}: {product.dtype} of {np.dtype(dtype)} operands")
        found.append(float(np.abs(np.asarray(product, np.float64) - exact).max()))
    errors[name] = found
    print(f"{name:18s} float32 {found[0]:.1e}  float64 {found[1]:.1e}")
narrow = max(single for single, _ in errors.values())
whole = all(errors[name][1] < 1e-11 for name in ("highest", "bfloat16"))
lost = all(errors[name][1] > 1e-5 for name in ("F32_F32_F32", "BF16_BF16_F32_X6")) and errors["BF16_BF16_F32"][1] > 0.05
sys.exit(not (narrow < 1e-3 and whole and lost))
EOF
