#!/usr/bin/env bash
# flax 0.12.8 and 0.12.12: `nnx.state(model)` and `nnx.merge(*nnx.split(model))` are no copies: a "best" state moves on.
#
# Both hold the Variables of the model themselves, and an optimiser step, like any update in place, changes what they hold.
# Keeping the best state for early stopping keeps the last one; an average of weights or a target network is the online one. So
# is what `nnx.to_pure_dict` makes after a step of a state that was taken before it.
#
# Do instead: `nnx.clone(model)`, or `jax.tree.map(jnp.copy, nnx.state(model))`, at the time.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   before the step: 0.757, after it: -0.243
#   nnx.state: -0.243, after nnx.update(model, state): -0.243
#   nnx.merge(*nnx.split): -0.243
#   nnx.clone: 0.757
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

import jax.numpy as jnp
import optax
from flax import nnx

model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
weight = lambda kernel: float(kernel[...][0, 0])
before = weight(model.kernel)
state, merged, clone = nnx.state(model), nnx.merge(*nnx.split(model)), nnx.clone(model)
optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model))
after, held = weight(model.kernel), weight(state["kernel"])
print(f"before the step: {before:.3f}, after it: {after:.3f}")
nnx.update(model, state)  # "go back to the best"
print(f"nnx.state: {held:.3f}, after nnx.update(model, state): {weight(model.kernel):.3f}")
print(f"nnx.merge(*nnx.split): {weight(merged.kernel):.3f}")
print(f"nnx.clone: {weight(clone.kernel):.3f}")
shared = held == weight(model.kernel) == weight(merged.kernel) == after
sys.exit(not (shared and before != after and weight(clone.kernel) == before))
EOF
