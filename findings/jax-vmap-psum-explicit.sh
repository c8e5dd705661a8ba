#!/usr/bin/env bash
# jax 0.12.0.1: psum over an axis of vmap raises within a mesh of Explicit axes, which is what jax.make_mesh gives.
#
# `jax.vmap(lambda x: jax.lax.psum(x.sum(), "batch"), axis_name="batch")` is refused in the scope of `jax.set_mesh(jax.make_mesh(...))`:
# "Length of sharding.spec (1) must be equal to aval's ndim (0)". Batch normalisation over such an axis is, too; nothing is sharded.
# jax 0.10.2 computes it.
#
# Do instead: `axis_types=(jax.sharding.AxisType.Auto,)`, or call it within `jax.set_mesh(None)`.
#
# Seen (x86-64, Python 3.12):
#   Auto: 8.0
#   Explicit: ValueError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -c "import sys; sys.exit(sys.version_info < (3, 12))" || exit 2  # the last jax for 3.11 is 0.10.2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOS'
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def total(kind):
    with jax.set_mesh(jax.make_mesh((1,), ("rows",), axis_types=(kind,))):
        try:
            return float(jax.jit(jax.vmap(lambda x: jax.lax.psum(x.sum(), "batch"), axis_name="batch"))(jnp.ones((4, 2)))[0])
        except ValueError as error:
            return type(error).__name__


found = {kind.name: total(kind) for kind in (AxisType.Auto, AxisType.Explicit)}
for name, value in found.items():
    print(f"{name}: {value}")
sys.exit(found != {"Auto": 8.0, "Explicit": "ValueError"})
EOS
