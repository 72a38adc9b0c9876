#!/usr/bin/env bash
# Gives the pod back; until then it costs. BUCKET keeps its files: delete.sh [--dry-run]
source "$(dirname "$0")/common.sh"
no_flags "$@"

run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
