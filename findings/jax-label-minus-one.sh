#!/usr/bin/env bash
# jax 0.10.2, optax 0.2.8: the label -1 (unknown, noise, pandas' code of a missing category) means the first class, the last
# class or nothing, depending on the function that counts it.
#
# jnp.bincount adds it to bin 0, `.at[labels].add` to the last bin, segment_sum and one_hot leave it out, optax's cross-entropy
# with integer labels trains the last class on it. np.bincount raises. A label of K is left out of the counts by all of them,
# and its cross-entropy is NaN. Nothing warns.
#
# Do instead: mask first: `jnp.where(labels < 0, K, labels)`, and drop bin K.
#
# Seen (Python 3.11, x86-64):
#   labels [0, 1, 2, -1, -1, -1]
#   jnp.bincount    [4, 1, 1]
#   zeros.at[].add  [1, 1, 4]
#   segment_sum     [1, 1, 1]
#   one_hot         [1, 1, 1]
#   cross-entropy of labels -1, 2 (the last), 3: [0.408, 0.408, nan]
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

labels = jnp.array([0, 1, 2, -1, -1, -1])
counts = {
    "jnp.bincount": jnp.bincount(labels, length=3),
    "zeros.at[].add": jnp.zeros(3).at[labels].add(1),
    "segment_sum": jax.ops.segment_sum(jnp.ones(6), labels, 3),
    "one_hot": jax.nn.one_hot(labels, 3).sum(0),
}
print("labels", labels.tolist())
for name, count in counts.items():
    print(f"{name:15}", count.astype(int).tolist())
logits = jnp.array([1.0, 2.0, 3.0])
loss = [float(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(k))) for k in (-1, 2, 3)]
print("cross-entropy of labels -1, 2 (the last), 3:", np.round(loss, 3).tolist())
expected = [[4, 1, 1], [1, 1, 4], [1, 1, 1], [1, 1, 1]]
sys.exit(not ([c.astype(int).tolist() for c in counts.values()] == expected and loss[0] == loss[1] and np.isnan(loss[2])))
EOF
