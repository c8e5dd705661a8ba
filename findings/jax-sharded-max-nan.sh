#!/usr/bin/env bash
# jax 0.10.2, CPU: jnp.max and jnp.min of an array that is sharded over devices lose its NaN: a check by the largest entry passes.
#
# Each device finds the NaN among its own entries; the reduction across devices then takes the larger number, for which NaN is
# none. So `jnp.max(jnp.abs(x)) < bound`, `jnp.min(weights) >= 0` or a norm of order inf says that all is well. jax.lax.pmax and
# pmin in shard_map do the same. On one device jnp.max is NaN, as numpy's, so that a test on one device does not show it.
# argmax, sums, jnp.any(jnp.isnan(x)), sort and logsumexp see the NaN. jax 0.12.0.1 does the same.
#
# Do instead: jnp.all(jnp.isfinite(x)); where the largest entry is reported, add 0 * jnp.sum(x).
#
# Seen (Python 3.11, x86-64; eight numbers on four devices, the one of row 4 is NaN):
#   one device:   max nan  min nan  axis 0 of two columns [nan, 15.0]
#   four devices: max 8.0  min 1.0  axis 0 of two columns [14.0, 15.0]
#   pmax: 8.0
#   argmax, any(isnan), sum: 4 True nan
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
"$work/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, P("data"))
values = np.array([1, 2, 3, 4, np.nan, 6, 7, 8], np.float32)
table = np.arange(16, dtype=np.float32).reshape(8, 2)
table[4, 0] = np.nan
found = []
for name, put in (("one device:  ", jnp.asarray), ("four devices:", lambda a: jax.device_put(a, rows))):
    x, pairs = put(values), put(table)
    found.append([float(jnp.max(x)), float(jnp.min(x)), *jnp.max(pairs, axis=0).tolist()])
    print(f"{name} max {found[-1][0]}  min {found[-1][1]}  axis 0 of two columns {found[-1][2:]}")
one, four = found
across = jax.shard_map(lambda x: jax.lax.pmax(jnp.max(x), "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
largest = float(across(x))
print("pmax:", largest)
sees = int(jnp.argmax(x)), bool(jnp.isnan(x).any()), float(x.sum())
print("argmax, any(isnan), sum:", *sees)
sees_it = sees[0] == 4 and sees[1] and np.isnan(sees[2])
sys.exit(not (np.isnan(one[:3]).all() and four == [8, 1, 14, 15] and largest == 8 and sees_it))
EOF
