#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: the last asynchronous save of a script that does not wait is lost, and the exit status is 0.
#
# `CheckpointManager` saves in the background by default. A script that ends after its last `save` (no `with`, no `close()`)
# ends while that is being written: all that is left is a folder that is not taken for a step, tracebacks of a thread on stderr,
# and an exit status of 0, by which a scheduler takes the job for done. `save` returned True, and `all_steps()` listed the step.
#
# Do instead: `with CheckpointManager(...) as manager`, or `wait_until_finished()`; look for the step before the job is called
# done.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   in the process: save returned True, all_steps() [0, 1, 2]
#   exit status 0
#   on disk: 0, 1, 2.orbax-checkpoint-tmp
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
pins="jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5"
"$work/venv/bin/python" -c "import sys; sys.exit(sys.version_info >= (3, 12))" && pins="jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check $pins orbax-checkpoint==0.12.8 || exit 2
export JAX_PLATFORMS=cpu
cat > "$work/train.py" <<'EOF'
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

manager = ocp.CheckpointManager(sys.argv[1])
for step in range(3):
    saved = manager.save(step, args=ocp.args.StandardSave({"w": jnp.zeros(2_000_000)}))
print(f"in the process: save returned {saved}, all_steps() {manager.all_steps()}")
EOF
status=0
"$work/venv/bin/python" "$work/train.py" "$work/run" 2>"$work/errors" || status=$?
echo "exit status $status"
found=$(ls "$work/run" | sort | paste -sd, | sed 's/,/, /g')
echo "on disk: $found"
[ "$status" = 0 ] && [ ! -d "$work/run/2" ]
