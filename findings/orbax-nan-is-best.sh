#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: a NaN metric is the best there is, in both modes, and the checkpoint that was the best is deleted.
#
# With best_fn and max_to_keep, the steps are sorted by their metric, and NaN sorts last, where the best is. An evaluation that
# fails once (0/0 in a score, a diverged batch) makes that step the best, and with max_to_keep=1 the true best is
# removed from disk; no warning.
#
# Do instead: leave the metric out, or give the worst number, where it is not finite.
#
# Seen (Python 3.11, x86-64):
#   best_mode='max': step 0 with score 0.5: on disk [0], best 0
#   best_mode='max': step 1 with score 0.9: on disk [1], best 1
#   best_mode='max': step 2 with score 0.1: on disk [1], best 1
#   best_mode='max': step 3 with score nan: on disk [3], best 3
#   best_mode='min': step 0 with score 0.5: on disk [0], best 0
#   best_mode='min': step 1 with score 0.9: on disk [0], best 0
#   best_mode='min': step 2 with score 0.1: on disk [2], best 2
#   best_mode='min': step 3 with score nan: on disk [3], best 3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 orbax-checkpoint==0.12.8 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import logging
import sys
import tempfile

import jax.numpy as jnp
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)
best = {}
for mode in ("max", "min"):
    with tempfile.TemporaryDirectory() as folder:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, best_fn=lambda metrics: metrics["score"], best_mode=mode, enable_async_checkpointing=False
        )
        with ocp.CheckpointManager(folder, options=options) as manager:
            for step, score in enumerate([0.5, 0.9, 0.1, float("nan")]):
                manager.save(step, args=ocp.args.StandardSave({"w": jnp.ones(2)}), metrics={"score": score})
                print(f"best_mode={mode!r}: step {step} with score {score}: on disk {manager.all_steps()}, best {manager.best_step()}")
            best[mode] = manager.best_step(), list(manager.all_steps())
sys.exit(best != {"max": (3, [3]), "min": (3, [3])})
EOF
