#!/usr/bin/env bash
# Starts the run on all workers, or continues it; a run that is going already goes on undisturbed:
# train.sh [--dry-run] [--config.GROUP.FIELD=VALUE ...]
source "$(dirname "$0")/common.sh"
bucket
for word in "$@"; do
    case "$word" in
        --config.* | --noconfig.* | --profile=*) ;;
        *) echo "train.sh: there is no flag '$word', only --config.GROUP.FIELD=VALUE, --profile, --dry-run and --help." >&2 && exit 2 ;;
    esac
done

flags=(
    --config="$CONFIG" --workdir="$BUCKET/runs/$RUN"
    --config.dataset.data_dir="$MOUNT/tensorflow_datasets" --config.mesh.replica="$SLICES" "$@"
)
# A wrong configuration is refused here, once, and not by every worker.
PYTHON=${PYTHON:-.venv/bin/python}
if [ -x "$PYTHON" ]; then
    JAX_PLATFORMS=cpu "$PYTHON" main.py "${flags[@]}" --check >&2 || exit 2
else
    echo "train.sh: the configuration is not checked here, for there is no $PYTHON (PYTHON names another)." >&2
fi
# The braces redirect their output: in the background they would keep ssh's open, and ssh would not return.
# resume.sh reads main.py's status.
everywhere "pgrep -f '$TRAINING' > /dev/null && echo it runs already || { rm -f ~/train.status; cd $CODE && \
{ { trap '' HUP; nohup .venv/bin/python main.py $(printf '%q ' "${flags[@]}"); echo \$? > ~/train.status; } \
>> ~/train.log 2>&1 < /dev/null & } }"
