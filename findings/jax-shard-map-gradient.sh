#!/usr/bin/env bash
# jax 0.10.2: the data-parallel step of pmap, `pmean(grad(loss)(params), axis)`, gives under jax.shard_map gradients that are too
# large by the number of devices, silently.
#
# Within shard_map a derivative in what is the same on all devices (in_specs P()) is summed over devices already, since
# check_vma=True, the default. A pmean behind it changes nothing, so that the mean over devices is the sum of their means; a psum
# counts every device's gradient n times over. Adam hides the factor, SGD, clipping and weight decay do not. pmap of the same
# function, and shard_map with check_vma=False, are right. jax 0.12.0.1 does the same.
#
# Do instead: take the pmean or psum of the loss, and the gradient of that; or jax.lax.pcast(params, axis, to="varying") first.
#
# Seen (Python 3.11, x86-64; loss mean(w * x) of 0, 1 .. 7 on four devices, so that the gradient is 3.5):
#   pmean(grad(loss)):                    14.0
#   psum(grad(loss)), of sums:           112.0, true 28.0
#   pmean(grad(loss)), check_vma=False:    3.5
#   grad(pmean(loss)):                     3.5
#   pmean(grad(loss)), pcast:              3.5
#   pmean(grad(loss)) under pmap:          3.5
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
"$work/venv/bin/python" - <<'EOF'
import sys
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

warnings.simplefilter("ignore", DeprecationWarning)  # of pmap
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
w, x = jnp.float32(1), jnp.arange(8.0)


def mean(w, x):
    return jnp.mean(w * x)


def mapped(function, **options):
    return float(jax.shard_map(function, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), **options)(w, x))


def step(w, x):
    return jax.lax.pmean(jax.grad(mean)(w, x), "data")


def sums(w, x):
    return jax.lax.psum(jax.grad(lambda w: jnp.sum(w * x))(w), "data")


found = {
    "pmean(grad(loss)):": mapped(step),
    "psum(grad(loss)), of sums:": mapped(sums),
    "pmean(grad(loss)), check_vma=False:": mapped(step, check_vma=False),
    "grad(pmean(loss)):": mapped(jax.grad(lambda w, x: jax.lax.pmean(mean(w, x), "data"))),
    "pmean(grad(loss)), pcast:": mapped(lambda w, x: step(jax.lax.pcast(w, "data", to="varying"), x)),
    "pmean(grad(loss)) under pmap:": float(jax.pmap(step, "data", in_axes=(None, 0))(w, x.reshape(4, 2))[0]),
}
for name, gradient in found.items():
    print(f"{name:36} {gradient:5.1f}" + (", true 28.0" if "sums" in name else ""))
sys.exit(list(found.values()) != [14, 112, 3.5, 3.5, 3.5, 3.5])
EOF
