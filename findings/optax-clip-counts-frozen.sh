#!/usr/bin/env bash
# optax 0.2.8: gradients of frozen parts count in a global clip that is chained before multi_transform.
#
# `chain(clip_by_global_norm(1.0), multi_transform({"frozen": set_to_zero(), ...}, labels))` clips by the norm of all gradients,
# and those of the frozen part, which are then thrown away, may be nearly all of it: what is trained moves a hundredth of what
# it should, with no sign but a slow loss. It is worst where a frozen pretrained encoder is large.
#
# Do instead: chain the clip into the transformation of the trained part.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   clipped around: trained part moves by 0.001, frozen by 0
#   clipped within: trained part moves by 0.100, frozen by 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
pins="jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5"
"$work/venv/bin/python" -c "import sys; sys.exit(sys.version_info >= (3, 12))" && pins="jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check $pins optax==0.2.8 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import jax.numpy as jnp
import optax

params = {"encoder": jnp.ones(4), "head": jnp.ones(4)}
gradients = {"encoder": jnp.full(4, 50.0), "head": jnp.full(4, 0.1)}  # of the head alone: a norm of 0.2, nothing to clip
labels = {"encoder": "frozen", "head": "trained"}
clip, frozen, trained = optax.clip_by_global_norm(1.0), optax.set_to_zero(), optax.sgd(1.0)
ways = {
    "around": optax.chain(clip, optax.multi_transform({"frozen": frozen, "trained": trained}, labels)),
    "within": optax.multi_transform({"frozen": frozen, "trained": optax.chain(clip, trained)}, labels),
}
moves = {}
for way, optimizer in ways.items():
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    moves[way] = float(-updates["head"][0])
    print(f"clipped {way}: trained part moves by {moves[way]:.3f}, frozen by {updates['encoder'][0]:.0f}")
sys.exit(not (moves["around"] < 0.01 * 1.1 * moves["within"] and abs(moves["within"] - 0.1) < 1e-6))
EOF
