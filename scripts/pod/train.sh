#!/usr/bin/env bash
# Starts the run on all workers, or goes on with it; where it runs already, it is let be:
# train.sh [--dry-run] [--config.GROUP.FIELD=VALUE ...]
source "$(dirname "$0")/common.sh"
bucket
for word in "$@"; do
    case "$word" in
        --config.*=* | --noconfig.* | --profile=*) ;;
        *) echo "train.sh: there is no flag '$word', only --config.GROUP.FIELD=VALUE, --profile, --dry-run and --help." >&2 && exit 2 ;;
    esac
done

flags=(
    --config="$CONFIG" --workdir="$BUCKET/runs/$RUN"
    --config.dataset.data_dir="$MOUNT/tensorflow_datasets" --config.mesh.replica="$SLICES" "$@"
)
# What is wrong is said here, before every worker says it.
PYTHON=${PYTHON:-.venv/bin/python}
if [ -x "$PYTHON" ]; then
    JAX_PLATFORMS=cpu "$PYTHON" main.py "${flags[@]}" --check >&2 || exit 2
else
    echo "train.sh: the configuration is not checked here, for there is no $PYTHON (PYTHON names another)." >&2
fi
# Braces with an output of their own: a list in the background would keep ssh's open, and ssh would not return.
# main.py's status is for resume.sh.
everywhere "pgrep -f '$TRAINING' > /dev/null && echo it runs already || { rm -f ~/train.status; cd $CODE && \
{ { trap '' HUP; nohup .venv/bin/python main.py $(printf '%q ' "${flags[@]}"); echo \$? > ~/train.status; } \
>> ~/train.log 2>&1 < /dev/null & } }"
