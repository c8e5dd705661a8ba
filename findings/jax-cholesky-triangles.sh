#!/usr/bin/env bash
# jax 0.10.2: jnp.linalg.cholesky and eigh of a covariance stored as its lower triangle are those of another matrix, silently;
# jax.scipy.linalg.cholesky(lower=True) of the same array is right.
#
# numpy, scipy and LAPACK read one triangle. jnp.linalg averages both first (symmetrize_input=True), so a zero upper triangle
# halves every covariance. The two Cholesky factors of one library differ, and neither warns.
#
# Do instead: fill both triangles before (L + L.T - diag), or `symmetrize_input=False`.
#
# Seen (Python 3.11, x86-64):
#   np.linalg                    factor [[2.0, 0.0], [1.0, 1.414]], covariance 2.00
#   jax.scipy.linalg             factor [[2.0, 0.0], [1.0, 1.414]], covariance 2.00
#   jnp.linalg                   factor [[2.0, 0.0], [0.5, 1.658]], covariance 1.00
#   jnp, symmetrize_input=False  factor [[2.0, 0.0], [1.0, 1.414]], covariance 2.00
#   eigenvalues: numpy [1.438 5.562] jnp [2.382 4.618]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

lower = np.tril([[4.0, 2.0], [2.0, 3.0]]).astype(np.float32)  # as LAPACK returns and reads it
factors = {
    "np.linalg": np.linalg.cholesky(lower),
    "jax.scipy.linalg": jax.scipy.linalg.cholesky(lower, lower=True),
    "jnp.linalg": jnp.linalg.cholesky(lower),
    "jnp, symmetrize_input=False": jnp.linalg.cholesky(lower, symmetrize_input=False),
}
for name, factor in factors.items():
    print(f"{name:28} factor {np.asarray(factor, float).round(3).tolist()}, covariance {float((factor @ factor.T)[0, 1]):.2f}")
print("eigenvalues: numpy", np.linalg.eigvalsh(lower).round(3), "jnp", np.asarray(jnp.linalg.eigvalsh(lower), float).round(3))
entry = [round(float((f @ f.T)[0, 1]), 3) for f in factors.values()]
sys.exit(entry != [2, 2, 1, 2])
EOF
