#!/usr/bin/env bash
# Starts the run on all workers, or goes on with it; where it runs already, it is let be:
# train.sh [--dry-run] [--config.GROUP.FIELD=VALUE ...]
source "$(dirname "$0")/common.sh"
bucket

flags=(
    --config="$CONFIG" --workdir="$BUCKET/runs/$RUN"
    --config.dataset.data_dir="$MOUNT/tensorflow_datasets" --config.mesh.replica="$SLICES" "$@"
)
# Braces with an output of their own: a list in the background would keep ssh's open, and ssh would not return.
# main.py's status is for resume.sh.
everywhere "pgrep -f '$TRAINING' > /dev/null && echo it runs already || { rm -f ~/train.status; cd $CODE && \
{ { trap '' HUP; nohup .venv/bin/python main.py $(printf '%q ' "${flags[@]}"); echo \$? > ~/train.status; } \
>> ~/train.log 2>&1 < /dev/null & } }"
