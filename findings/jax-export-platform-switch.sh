#!/usr/bin/env bash
# jax 0.10.2: a program that `jax.export` makes for two platforms holds a switch, and each product once for every platform.
#
# `x @ w` alone, exported for ("cpu", "cuda"), has `stablehlo.case` over the platform, in whose branches stands
# the same `dot_general`; for one platform it is a single `dot_general`. Converters to other runtimes stop at the switch, though
# nothing in the function depends on the platform.
#
# Do instead: export for one platform what is to be converted.
#
# Seen (Python 3.11, x86-64): operations in the text of the program
#   cpu             case 0, dot_general 1
#   cuda            case 0, dot_general 1
#   cpu, cuda       case 2, dot_general 2
#   cpu, cuda, tpu  case 2, dot_general 3
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 || exit 2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import re
import sys

import jax
import jax.export
import jax.numpy as jnp

w = jnp.ones((3, 2))
seen = {}
for platforms in (("cpu",), ("cuda",), ("cpu", "cuda"), ("cpu", "cuda", "tpu")):
    program = jax.export.export(jax.jit(lambda x: x @ w), platforms=platforms)(jax.ShapeDtypeStruct((4, 3), "float32"))
    text = program.mlir_module()
    seen[platforms] = tuple(len(re.findall(rf"= \"?stablehlo\.{name}", text)) for name in ("case", "dot_general"))
    print(f"{', '.join(platforms):14}  case {seen[platforms][0]}, dot_general {seen[platforms][1]}")
sys.exit(list(seen.values()) != [(0, 1), (0, 1), (2, 2), (2, 3)])
EOF
