#!/usr/bin/env bash
# jax 0.10.2, 0.12.0.1: device_put of float64 rows over several devices keeps the dtype that it had in the other mode of x64.
#
# `jax.device_put(x, sharding)` of a NumPy array of float64, once while 64 bits are off and once while they are on: the second result
# says float64 and holds float32, and nothing that is computed from it can be relied on. On one device all is well.
#
# Do instead: `jax.device_put(x.astype(jax.dtypes.canonicalize_dtype(x.dtype)), sharding)`.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   the second array says float64, its parts float32
#   in its own dtype: float64, parts float64
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
pins="jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5"
"$work/venv/bin/python" -c "import sys; sys.exit(sys.version_info >= (3, 12))" && pins="jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check $pins || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOS'
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 2)
sharding = NamedSharding(jax.make_mesh((2,), ("rows",)), PartitionSpec("rows"))
x = np.arange(8.0).reshape(4, 2)


def dtypes(convert):
    jax.device_put(convert(x), sharding)
    with jax.enable_x64(True):
        second = jax.device_put(convert(x), sharding)
    return str(second.dtype), str(second.addressable_shards[0].data.dtype)


as_is = dtypes(lambda x: x)
print("the second array says {}, its parts {}".format(*as_is))
converted = dtypes(lambda x: x.astype(jax.dtypes.canonicalize_dtype(x.dtype)))
print("in its own dtype: {}, parts {}".format(*converted))
sys.exit(not (as_is == ("float64", "float32") and converted == ("float64", "float64")))
EOS
