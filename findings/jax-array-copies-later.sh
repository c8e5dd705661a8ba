#!/usr/bin/env bash
# jax 0.10.2, CPU: jnp.array(x) of a numpy array, and a jitted function of one, read x after they have returned: what is written to x
# meanwhile is what they get.
#
# jnp.array is the copying one, and does copy, but as a program that waits for its turn; so does every call of a jitted function
# with a numpy array. A reader that fills one buffer again and again (shared memory, torch's .numpy(), h5py's read_direct) gives
# each step the rows of a later one, without an error. Memory that is aligned to 64 bytes is read so in any case, other memory
# when it is large. While nothing else runs the copy is mostly in time: a test of one line passes. jnp.asarray and
# device_put(may_alias=False) do the same. jax 0.12.0.1 does so with aligned memory.
#
# Do instead: give it x.copy(), which numpy makes at once; or block_until_ready() before the buffer is written to.
#
# Seen (Python 3.11, x86-64; one buffer filled with 0, 1 .. 49, while products run; how many arrays hold another number):
#   jnp.array(x):                      50 of 50
#   jnp.array(x, copy=True):           50 of 50
#   jax.jit(lambda x: x + 0)(x):       50 of 50
#   jnp.array(x).block_until_ready():   0 of 50
#   jnp.asarray(x.copy()):              0 of 50
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np

memory = np.empty(2**18 + 64, np.uint8)
start = -memory.ctypes.data % 64
x = memory[start : start + 2**18].view(np.float32)
square, step = jnp.ones((600, 600)), jax.jit(lambda x: x + 0)
found = []
for name, convert in (
    ("jnp.array(x):", jnp.array),
    ("jnp.array(x, copy=True):", lambda x: jnp.array(x, copy=True)),
    ("jax.jit(lambda x: x + 0)(x):", step),
    ("jnp.array(x).block_until_ready():", lambda x: jnp.array(x).block_until_ready()),
    ("jnp.asarray(x.copy()):", lambda x: jnp.asarray(x.copy())),
):
    convert(x).block_until_ready()  # compiled
    products, arrays = [], []
    for number in range(50):
        x[:] = number
        products.append(square @ square)
        arrays.append(convert(x))
    x[:] = -1
    found.append(sum(not (np.asarray(array) == number).all() for number, array in enumerate(arrays)))
    print(f"{name:33} {found[-1]:3d} of 50")
sys.exit(not (min(found[:3]) > 10 and found[3:] == [0, 0]))
EOF
