#!/usr/bin/env bash
# optax 0.2.8: value_and_grad_from_state returns value *and gradient* of the previous batch.
#
# L-BFGS keeps what its line search computed last, and value_and_grad_from_state hands that out in place of calling the function
# it is given, without looking at the arguments. In a loop over batches, each batch is never seen by its own step: loss curves lag
# by one, the direction is that of the batch before, and `value_and_grad_from_state(f)(params, batch, state=state)` reads as
# if it took this batch. It is right for one fixed function only.
#
# Do instead: `jax.value_and_grad(f)(params, batch)` at each step.
#
# Seen (Python 3.11, x86-64):
#   batch 1: value 2.00 (true 2.00), gradient -2.00 (true -2.00)
#   batch 5: value 0.17 (true 36.86), gradient -0.59 (true -8.59)
#   batch 0: value 36.86 (true 1.00), gradient -8.59 (true 1.41)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax


def loss(w, batch):
    return jnp.sum((w - batch) ** 2)


optimizer, w = optax.lbfgs(), jnp.zeros(2)
state, cached = optimizer.init(w), optax.value_and_grad_from_state(loss)
stale = []
for batch in (jnp.ones(2), jnp.full(2, 5.0), jnp.zeros(2)):
    value, grad = cached(w, batch, state=state)
    true_value, true_grad = jax.value_and_grad(loss)(w, batch)
    stale.append(not np.allclose(value, true_value) and not np.allclose(grad, true_grad))
    print(f"batch {batch[0]:.0f}: value {value:.2f} (true {true_value:.2f}), gradient {grad[0]:.2f} (true {true_grad[0]:.2f})")
    updates, state = optimizer.update(
        grad, state, w, value=value, grad=grad, value_fn=lambda w, batch=batch: loss(w, batch)
    )
    w = optax.apply_updates(w, updates)
sys.exit(stale != [False, True, True])
EOF
