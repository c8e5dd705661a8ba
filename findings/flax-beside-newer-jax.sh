#!/usr/bin/env bash
# flax 0.12.8 and 0.12.9: install beside a jax that is too new for them, `pip check` is content, and `import flax.nnx` fails.
#
# flax has lower bounds of jax and no upper one, and uses `jax.experimental.hijax`, whose names move: 0.12.8 breaks from jax
# 0.11.1 on, 0.12.9 from 0.11.2 on; 0.12.10 and 0.12.12 work with 0.11.1 to 0.12.0.1. A resolver that updates jax alone, or
# keeps flax from a lock file, makes an environment in which nothing that uses NNX starts, at the first use and not before:
# `import flax` and linen work.
#
# Do instead: require `flax>=0.12.10` with jax 0.11.1 or newer, `flax==0.12.8` with jax 0.10; update both together.
#
# Seen (Python 3.12, x86-64):
#   jax 0.12.0.1, flax 0.12.8: No broken requirements found. | AttributeError: module 'jax.experimental.hijax' has no attribute 'HiPrimitive'
#   jax 0.12.0.1, flax 0.12.12: No broken requirements found. | imported
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}  # 3.12 or newer: the last jax for Python 3.11 is 0.10.2
"$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" || exit 2
"$python" -m venv "$work/venv" || exit 2
export JAX_PLATFORMS=cpu
seen=()
for flax in 0.12.8 0.12.12; do
  "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 flax==$flax || exit 2
  checked=$("$work/venv/bin/python" -m pip check) || exit 1
  imported=$("$work/venv/bin/python" -c "import flax.nnx; print('imported')" 2>&1 | tail -1) || true
  echo "jax 0.12.0.1, flax $flax: $checked | $imported"
  seen+=("${imported%%:*}")
done
[ "${seen[*]}" = "AttributeError imported" ]
