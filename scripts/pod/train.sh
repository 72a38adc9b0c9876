#!/usr/bin/env bash
# Starts the run on all workers, or goes on with it; where it runs already, it is let be:
# train.sh [--dry-run] [--config.GROUP.FIELD=VALUE ...]
source "$(dirname "$0")/common.sh"
bucket

flags=(
    --config="$CONFIG" --workdir="$BUCKET/runs/$RUN"
    --config.dataset.data_dir="$MOUNT/tensorflow_datasets" --config.mesh.replica="$SLICES" "$@"
)
# The braces: of a list in the background a shell would keep ssh's output open, and ssh would not return.
everywhere "pgrep -f '$TRAINING' > /dev/null && echo it runs already || { cd $CODE && \
{ nohup .venv/bin/python main.py $(printf '%q ' "${flags[@]}")>> ~/train.log 2>&1 < /dev/null & } }"
