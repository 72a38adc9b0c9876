#!/usr/bin/env bash
# Stops the run, which saves first, and leaves the pod as it is; train.sh goes on with it: stop.sh [--dry-run]
source "$(dirname "$0")/common.sh"
no_flags "$@"
bucket

everywhere "pkill -TERM -f '$TRAINING' || echo nothing runs"
