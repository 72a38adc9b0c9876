#!/usr/bin/env bash
# Brings a pod that was taken away back, until the run is finished: resume.sh [--dry-run] [train.sh's flags ...]
# Each time it deletes what is left of the pod, asks for another, installs, and starts the same run, which goes on.
source "$(dirname "$0")/common.sh"
bucket
here=scripts/pod

again() {
    "$here/delete.sh" "${dry[@]}"
    "$here/create.sh" "${dry[@]}"
    "$here/install.sh" "${dry[@]}"
    "$here/train.sh" "${dry[@]}" "$@"
}

if [ "$DRY" = 1 ]; then
    echo "# until there is $BUCKET/runs/$RUN/summary.json, whenever the pod is not ACTIVE:"
    again "$@"
    exit
fi
until gcloud storage ls "$BUCKET/runs/$RUN/summary.json" > /dev/null 2>&1; do
    [ "$("${describe[@]}" 2> /dev/null)" = ACTIVE ] || again "$@"
    sleep 60
done
