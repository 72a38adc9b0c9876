#!/usr/bin/env bash
# Shows the pod's state and what process 0 prints; TensorBoard reads BUCKET: watch.sh [--dry-run]
source "$(dirname "$0")/common.sh"
no_flags "$@"
bucket

echo "# in another terminal: tensorboard --logdir=$BUCKET/runs/$RUN"
run "${describe[@]}"
run gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" --zone="$ZONE" --worker=0 --command="tail -n 50 -F ~/train.log"
