#!/usr/bin/env bash
# grain 0.2.18: the state of an iterator is an index; set on another batch size or seed, it goes on elsewhere, silently.
#
# `get_state()` of a MapDataset's iterator is {"next_index": n}. A run that is resumed with another batch size, number of hosts
# or seed takes it without a word: rows are seen twice, or never, in that epoch.
#
# Do instead: keep batch size, seed and length of the data with the state, and compare them before `set_state`.
#
# Seen (x86-64; the same on Python 3.11 and 3.12):
#   state after 3 batches of 10: {'next_index': 3}
#   the same pipeline goes on with rows not seen before: 10 of 10
#   batches of 5: 0 of 5
#   another seed: 9 of 10
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
pins="numpy==2.5.5"
"$work/venv/bin/python" -c "import sys; sys.exit(sys.version_info >= (3, 12))" && pins="numpy==2.4.6"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check $pins grain==0.2.18 || exit 2
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" - <<'EOF'
import sys

import grain
import numpy as np


def batches(size, seed):
    return iter(grain.MapDataset.source(np.arange(100)).seed(seed).shuffle().batch(size).to_iter_dataset())


rows = batches(10, 0)
seen = {int(row) for _ in range(3) for row in next(rows)}
state = rows.get_state()
print("state after 3 batches of 10:", state)
fresh = []
same = "the same pipeline goes on with rows not seen before"
for size, seed, name in ((10, 0, same), (5, 0, "batches of 5"), (10, 1, "another seed")):
    other = batches(size, seed)
    other.set_state(state)
    fresh.append(sum(int(row) not in seen for row in next(other)))
    print(f"{name}: {fresh[-1]} of {size}")
sys.exit(not (fresh[0] == 10 and fresh[1] == 0 and fresh[2] < 10))
EOF
