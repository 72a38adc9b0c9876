#!/usr/bin/env bash
# Stops the run, which saves first, and keeps the pod; train.sh continues the run: stop.sh [--dry-run]
source "$(dirname "$0")/common.sh"
no_flags "$@"
bucket

everywhere "pkill -TERM -f '$TRAINING' || echo nothing runs"
