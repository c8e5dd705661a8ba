#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: an int64 count of 2**40 that was saved under x64 is restored as 0 where x64 is off, without a
# warning.
#
# The restored array is int32, and 2**40 loses all its bits; float64 becomes float32 likewise. Counters of rows or tokens and
# seeds made of hashes become other valid numbers. With numpy arrays as template they come back whole, without x64.
#
# Do instead: restore with numpy arrays as template, or compare with the dtypes of item_metadata.
#
# Seen (Python 3.11, x86-64):
#   saved [1099511627776, 7]; restored [0, 7] int32 warnings about it: []
#   with a numpy template [1099511627776, 7] int64
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 orbax-checkpoint==0.12.8 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import logging
import os
import sys
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    path = os.path.join(folder, "step")
    with jax.enable_x64(True):
        checkpointer.save(path, {"rows": jnp.array([2**40, 7])})
        checkpointer.wait_until_finished()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bare = checkpointer.restore(path)["rows"]
    kept = checkpointer.restore(path, {"rows": np.zeros(2, np.int64)})["rows"]
truncations = [str(w.message) for w in caught if "trunc" in str(w.message)]
print("saved [1099511627776, 7]; restored", bare.tolist(), bare.dtype, "warnings about it:", truncations)
print("with a numpy template", kept.tolist(), kept.dtype)
sys.exit(not (bare.tolist() == [0, 7] and not truncations and kept.tolist() == [2**40, 7]))
EOF
