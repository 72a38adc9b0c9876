#!/usr/bin/env bash
# Converts the run to its inference form, checks it, and copies it to BUCKET: export.sh [--dry-run] [convert's flags ...]
source "$(dirname "$0")/common.sh"
bucket

run python3 -m venv .venv
run .venv/bin/python -m pip install --quiet -e ".[gcs]"
run .venv/bin/python -m castling_jax.tools.convert "$BUCKET/runs/$RUN" "exported/$RUN" "$@"
run gcloud storage cp --recursive "exported/$RUN" "$BUCKET/exported/"
