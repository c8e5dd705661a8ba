#!/usr/bin/env bash
# flax 0.12.8 and 0.12.12: dropout of an NNX module under `nnx.bridge.ToLinen`, without rngs, has one mask for ever.
#
# linen's Dropout refuses to run without `rngs={"dropout": key}`. Bridged, NNX's runs with the state that its stream had when it
# was made: every call, and so every step of a training loop, drops the same units. Nothing is raised, and `mutable=True` does
# not help.
#
# Do instead: pass `rngs={"dropout": key}` with a new key at every call, and test that two calls differ.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   linen without rngs: InvalidRngError
#   bridged without rngs: [2. 0. 2. 0. 2. 2. 2. 0.] and [2. 0. 2. 0. 2. 2. 2. 0.]
#   bridged with rngs: [2. 2. 0. 2. 0. 0. 0. 0.] and [0. 2. 2. 2. 0. 0. 0. 0.]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
pins="jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 flax==0.12.12"
"$work/venv/bin/python" -c "import sys; sys.exit(sys.version_info >= (3, 12))" && pins="jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 flax==0.12.8"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check $pins optax==0.2.8 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(x)


x = jnp.ones(8)
try:
    nn.Dropout(0.5, deterministic=False).apply({}, x)
except Exception as error:
    refused = type(error).__name__
print("linen without rngs:", refused)
bridged = nnx.bridge.ToLinen(Net)
variables = bridged.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
first, second = (bridged.apply(variables, x) for _ in range(2))
print("bridged without rngs:", first, "and", second)
with_rngs = [bridged.apply(variables, x, rngs={"dropout": jax.random.key(seed)}) for seed in (5, 6)]
print("bridged with rngs:", *with_rngs[:1], "and", *with_rngs[1:])
same, differ = bool((first == second).all() and (first == 0).any()), not bool((with_rngs[0] == with_rngs[1]).all())
sys.exit(not (refused == "InvalidRngError" and same and differ))
EOF
