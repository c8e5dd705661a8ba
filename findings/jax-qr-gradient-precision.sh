#!/usr/bin/env bash
# jax 0.10.2: of the matrix decompositions, QR alone has a derivative whose products ask for no precision.
#
# Products without a precision are rounded to TF32 or bfloat16 on GPUs and TPUs, which is why the derivatives of cholesky,
# eigh, svd, lu, solve, inv and expm all ask for Precision.HIGHEST. Those of jnp.linalg.qr do not: gradients through it have
# three digits there, though the factors are whole, and on CPUs nothing shows. jax 0.12.0 does the same.
#
# Do instead: jax.default_matmul_precision("highest") where the derivative is formed, for example in a jax.custom_jvp whose
# rule is jax.jvp(jnp.linalg.qr, ...) in this context.
#
# Seen (Python 3.11, x86-64; precisions of all products in the gradient's program):
#   cholesky  HIGHEST
#   eigh      HIGHEST
#   svd       HIGHEST
#   lu        HIGHEST
#   solve     HIGHEST
#   inv       HIGHEST
#   expm      HIGHEST
#   qr        none asked for
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

calls = {
    "cholesky": jnp.linalg.cholesky,
    "eigh": lambda matrix: tuple(jnp.linalg.eigh(matrix)),
    "svd": lambda matrix: tuple(jnp.linalg.svd(matrix)),
    "lu": lambda matrix: jax.lax.linalg.lu(matrix)[0],
    "solve": lambda matrix: jnp.linalg.solve(matrix, jnp.ones((4, 2))),
    "inv": jnp.linalg.inv,
    "expm": jax.scipy.linalg.expm,
    "qr": lambda matrix: tuple(jnp.linalg.qr(matrix)),
}


def precisions(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "jaxpr")):
            yield from precisions(inner.jaxpr) if hasattr(inner, "jaxpr") else ()


seen = {}
for name, call in calls.items():
    loss = lambda matrix, call=call: sum(jnp.sum(part) for part in jax.tree.leaves(call(matrix)))
    asked = list(precisions(jax.make_jaxpr(jax.grad(loss))(2 * jnp.eye(4)).jaxpr))
    whole = (jax.lax.Precision.HIGHEST,) * 2
    seen[name] = "HIGHEST" if set(asked) == {whole} else "none asked for" if set(asked) == {None} else str(set(asked))
    print(f"{name:9s} {seen[name]}")
sys.exit(not (seen.pop("qr") == "none asked for" and set(seen.values()) == {"HIGHEST"}))
EOF
