#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: `v1.save(path, tree, overwrite=True)` deletes every file that was in the folder, whoever wrote it.
#
# The folder need not hold a checkpoint. `overwrite=True` is what one adds after "already exists" for a run's folder, and
# configuration, logs and results beside the checkpoint are gone, without a word.
#
# Do instead: give the checkpoint a folder of its own, `path / "1"`.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   without overwrite: ValueError
#   with overwrite: ['_CHECKPOINT_METADATA', 'commit_success.txt', 'orbax.checkpoint', 'state']
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
run = pathlib.Path(tempfile.mkdtemp()) / "run"
run.mkdir()
(run / "config.json").write_text("{}")
(run / "results.csv").write_text("accuracy\n0.9\n")
refused = None
try:
    v1.save(run, {"w": jnp.ones(2)})
except Exception as error:
    refused = type(error).__name__
print("without overwrite:", refused)
v1.save(run, {"w": jnp.ones(2)}, overwrite=True)
names = sorted(path.name for path in run.iterdir())
print("with overwrite:", names)
sys.exit(not (refused and "config.json" not in names and "results.csv" not in names))
EOF
