#!/usr/bin/env bash
# One host with several GPUs: one process drives them all, the batch is split over them.
#   experiments/launch/multi_gpu.sh mnist [options of the experiment]
# Install once: pip install -e ".[experiments]" "jax[cuda13]"   (or jax[cuda12], as the driver asks for)
set -euo pipefail
cd "$(dirname "$0")/../.."

experiment=${1:?name of an experiment, as mnist}
shift
gpus=$(python -c 'import jax; print(jax.device_count("gpu"))')
# a multiple of the number of GPUs, some 1024 rows each; --gradient.batch-size among the options overrides it
batch=$((1024 * gpus))

# told to stop, a run saves and ends with 75; the same command then goes on
exec python -m experiments.train "$experiment" --gradient.batch-size "$batch" "$@"
