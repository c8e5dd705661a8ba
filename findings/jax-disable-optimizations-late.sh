#!/usr/bin/env bash
# jax 0.10.2 (0.12.0.1 too): `jax_disable_most_optimizations` does nothing for a function that has been called before.
#
# Other options that a program depends on, as `jax_default_matmul_precision`, are part of the key under which compiled
# programs are kept in the process: the next call compiles anew. This one is part of the key on disk alone. Whoever sets it
# to see if rounding or speed comes from optimizations compares a program with itself; and once the cache of the process is
# dropped, the same call on the same numbers runs another program, and may round otherwise.
#
# Do instead: `jax.clear_caches()` after setting it, or set it in the environment before the first program.
#
# Seen (Python 3.11, x86-64): programs compiled by the call after an option was set
#   jax_disable_most_optimizations 0   then jax.clear_caches() 1   jax_default_matmul_precision 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp

compiled = []
event = "/jax/core/compile/backend_compile_duration"
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.extend([name] * (name == event)))
function, x = jax.jit(lambda x: jnp.sum(jnp.exp(x) @ x)), jnp.ones((8, 8))


def programs():
    before = len(compiled)
    function(x).block_until_ready()
    return len(compiled) - before


assert programs() == 1 and programs() == 0
jax.config.update("jax_disable_most_optimizations", True)
late = programs()
jax.clear_caches()
cleared = programs()
jax.config.update("jax_default_matmul_precision", "float32")
precision = programs()
print(f"jax_disable_most_optimizations {late}   then jax.clear_caches() {cleared}   jax_default_matmul_precision {precision}")
sys.exit((late, cleared, precision) != (0, 1, 1))
EOF
