#!/usr/bin/env bash
# Converts the run to its inference form on a worker's CPU, compares both forms on held-out images, and copies the
# exported folder to BUCKET: export.sh [--dry-run] [convert's flags ...]
source "$(dirname "$0")/common.sh"
bucket

flags=("$BUCKET/runs/$RUN" "exported/$RUN" --check "$@")
# On one host of a pod JAX would wait for the other hosts.
on_workers "$(nodes | head -n 1)" 0 "cd $CODE && \
JAX_PLATFORMS=cpu .venv/bin/python -m castling_jax convert $(printf '%q ' "${flags[@]}")&& \
gcloud storage cp --recursive exported/$RUN $BUCKET/exported/"
