#!/usr/bin/env bash
# One host with several GPUs: one process drives them all, the batch is split over them.
#   experiments/launch/multi_gpu.sh mnist [options of the experiment]
# Install once, in the repository: python3 -m venv .venv && .venv/bin/pip install -e ".[experiments]" "jax[cuda13]"
# (or jax[cuda12], as the driver asks for). --gradient.batch-size must be a multiple of the number of GPUs.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
experiment=${1:?name of an experiment, as mnist}
shift

# told to stop, a run saves and ends with 75; the same command then goes on. Without the flag, GPUs may add up in
# another order each time, and a resumed run then ends as an uninterrupted one to rounding only
export XLA_FLAGS="--xla_gpu_deterministic_ops=true ${XLA_FLAGS:-}"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -m experiments.train "$experiment" "$@"
