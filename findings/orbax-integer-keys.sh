#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a tree with integer keys comes back, without a template, with its leaves in another order, from
# eleven entries on.
#
# Keys become strings, and strings sort as 0, 1, 10, 11, 2, ...: `jax.tree.leaves` and `jax.tree.unflatten` of what is restored
# put component 10 in the place of component 2. All shapes agree, so nothing fails; up to ten entries all is well. Lists keep
# their order. With the original tree as template the keys are integers again.
#
# Do instead: restore with a template, or use lists or zero-padded names.
#
# Seen (Python 3.11, x86-64):
#   keys restored: ['0', '1', '10', '11', '2', '3', '4', '5', '6', '7', '8', '9']
#   leaves put back into the tree: {0: 0, 1: 1, 2: 10, 3: 11, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 7, 10: 8, 11: 9}
#   with a template: {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9, 10: 10, 11: 11}
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

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)
tree = {k: jnp.full(2, float(k)) for k in range(12)}
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    path = os.path.join(folder, "step")
    checkpointer.save(path, tree)
    checkpointer.wait_until_finished()
    bare, same = checkpointer.restore(path), checkpointer.restore(path, tree)
print("keys restored:", list(bare))
again = jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(bare))
print("leaves put back into the tree:", {k: int(v[0]) for k, v in again.items()})
print("with a template:", {k: int(v[0]) for k, v in same.items()})
sys.exit(not (int(again[2][0]) == 10 and all(int(v[0]) == k for k, v in same.items())))
EOF
