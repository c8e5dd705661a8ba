#!/usr/bin/env bash
# safetensors 0.8.0, numpy: `load(bytes)` does not read the bfloat16 that `save` has written; `load_file` of the same bytes does.
#
# Of float8_e4m3fn neither reads what `save` and `save_file` take without a word. Both are dtypes of ml_dtypes, which JAX
# brings: half-precision leaves of a network are saved well, and fail where they are served from bytes of a store.
#
# Do instead: read from a file, and float8 through another framework's loader, or save it as uint8.
#
# Seen (Python 3.11, x86-64):
#   bfloat16       load KeyError BF16            load_file [1.0, 2.0]
#   float8_e4m3fn  load KeyError F8_E4M3         load_file AttributeError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.5.4 || exit 2
"$work/venv/bin/python" - "$work" <<'EOF'
import sys

import ml_dtypes
import numpy as np
from safetensors.numpy import load, load_file, save, save_file


def outcome(read, source):
    try:
        return str(read(source)["w"].astype(float).tolist())
    except (KeyError, AttributeError) as error:
        return type(error).__name__ + (f" {error.args[0]}" if isinstance(error, KeyError) else "")


seen = {}
for name in ("bfloat16", "float8_e4m3fn"):
    tree = {"w": np.array([1.0, 2.0]).astype(getattr(ml_dtypes, name))}
    save_file(tree, f"{sys.argv[1]}/{name}")
    seen[name] = outcome(load, save(tree)), outcome(load_file, f"{sys.argv[1]}/{name}")
    print(f"{name:14} load {seen[name][0]:20}  load_file {seen[name][1]}")
sys.exit(seen != {"bfloat16": ("KeyError BF16", "[1.0, 2.0]"), "float8_e4m3fn": ("KeyError F8_E4M3", "AttributeError")})
EOF
