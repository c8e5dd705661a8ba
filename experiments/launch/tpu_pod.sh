#!/usr/bin/env bash
# A TPU pod slice: one process on every host, started from your own machine.
#   TPU=my-slice ZONE=us-central2-b BUCKET=my-bucket experiments/launch/tpu_pod.sh mnist [options of the experiment]
# Every host needs this repository in ~/flax_hmog and, mounted at the same place, one folder for runs and data:
# a network disk, or a bucket by gcsfuse, as here. Data are prepared by the first host, and read by each in part.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${BUCKET:?bucket for runs and data}"
experiment=${1:?name of an experiment, as mnist}
shift

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "$1"
}

on_all_hosts "cd ~/flax_hmog && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[experiments]' 'jax[tpu]'
  mkdir -p ~/shared && (mountpoint -q ~/shared || gcsfuse --implicit-dirs $BUCKET ~/shared)"

# the hosts find each other ("auto"); a batch of 128 rows for each of up to 64 chips. A maintenance event, or the end of
# a preemptible slice, is seen by all hosts at the same step: they save, end with 75, and this command goes on from there
on_all_hosts "cd ~/flax_hmog && .venv/bin/python -m experiments.train $experiment --processes.coordinator auto \
  --workdir ~/shared/runs/$experiment --data.folder ~/shared/data --gradient.batch-size 8192 $*"
