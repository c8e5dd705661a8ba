#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: `v1.load(path)` of a checkpoint with several trees returns one of them, chosen by nobody.
#
# Saved by `save_checkpointables({"weights": ..., "ema": ...})`, or by today's API as items, a step holds several trees.
# `load(path)` without a name does not ask which, and returns the one that it comes across first, here the averages in place of
# the weights. Both have one structure, so that a template does not tell either.
#
# Do instead: `load_checkpointables(path)["weights"]`, or `checkpointable_name="weights"`.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   saved: weights 1.0, ema 0.5
#   v1.load(path): {'w': 0.5}
#   load_checkpointables: {'ema': 0.5, 'weights': 1.0}
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
pins="jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5"
"$work/venv/bin/python" -c "import sys; sys.exit(sys.version_info >= (3, 12))" && pins="jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check $pins orbax-checkpoint==0.12.8 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import logging
import pathlib
import sys
import tempfile
import warnings

import jax.numpy as jnp
from orbax.checkpoint.experimental import v1

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
path = pathlib.Path(tempfile.mkdtemp()) / "1"
v1.save_checkpointables(path, {"weights": {"w": jnp.full(2, 1.0)}, "ema": {"w": jnp.full(2, 0.5)}})
print("saved: weights 1.0, ema 0.5")
read = v1.load(path, {"w": jnp.zeros(2)})
print("v1.load(path):", {name: float(leaf[0]) for name, leaf in read.items()})
both = {name: float(tree["w"][0]) for name, tree in sorted(v1.load_checkpointables(path).items())}
print("load_checkpointables:", both)
sys.exit(not (float(read["w"][0]) == 0.5 and both == {"ema": 0.5, "weights": 1.0}))
EOF
