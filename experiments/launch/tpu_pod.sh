#!/usr/bin/env bash
# A TPU pod slice: one process on every host, started from your own machine.
#   TPU=my-slice ZONE=us-central2-b SHARED=/mnt/shared experiments/launch/tpu_pod.sh mnist [options of the experiment]
# Every host needs this repository in ~/flax_hmog and, mounted at $SHARED, one network file system for runs and data
# (NFS, as Filestore). A bucket mounted by gcsfuse does not serve: checkpoints are committed by renaming a folder, which
# it does not do in one step. Data are prepared by the first host, and read by each in part.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${SHARED:?folder of a network file system on all hosts}"
experiment=${1:?name of an experiment, as mnist}
shift
options=""
[ $# -eq 0 ] || options=$(printf " %q" "$@")

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "$1"
}

on_all_hosts "cd ~/flax_hmog && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[experiments]' 'jax[tpu]'"

# the hosts find each other ("auto"). A maintenance event, or the end of a preemptible slice, is seen by all of them at
# the same step: they save, end with 75, and this command goes on from there. --gradient.batch-size must be a multiple of
# the number of chips
on_all_hosts "cd ~/flax_hmog && .venv/bin/python -m experiments.train $experiment --processes.coordinator auto \
  --workdir $SHARED/runs/$experiment --data.folder $SHARED/data$options"
