#!/usr/bin/env bash
# Looks once a minute until the run is finished, and makes it go on: resume.sh [--dry-run] [train.sh's flags ...]
# It deletes, requests and installs a pod that was taken away. It restarts a run that ended on a living pod, at most
# RESTARTS times (3), unless the run would only fail in the same way. When a look fails, the next one asks again.
source "$(dirname "$0")/common.sh"
bucket
RESTARTS=${RESTARTS:-3}
SAME_AGAIN=3 # main.py's status where the same command would only fail in the same way

start() {
    scripts/pod/install.sh && scripts/pod/train.sh "$@"
}

ask() {
    scripts/pod/create.sh && start "$@"
}

again() {
    scripts/pod/delete.sh && ask "$@"
}

# try FUNCTION [flags ...]: a failure ends nothing; the next look sees it.
try() {
    "$@" || echo "That failed; once more in a minute." >&2
}

# The answer of worker 0: running, ended STATUS, or something else where it cannot be reached.
answer() {
    gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" --zone="$ZONE" --worker=0 \
        --command="pgrep -f '$TRAINING' > /dev/null && echo running || echo ended \$(cat ~/train.status)" 2> /dev/null || true
}

if [ "$DRY_RUN" = 1 ]; then
    echo "# until there is $BUCKET/runs/$RUN/summary.json, whenever the pod was taken away:"
    again "$@"
    exit
fi
left=$RESTARTS
until gcloud storage ls "$BUCKET/runs/$RUN/summary.json" > /dev/null 2>&1; do
    state=$("${describe[@]}" 2>&1) || state="no answer: $state"
    case "$state" in
        ACTIVE)
            case "$(answer)" in
                *running*) ;;
                *"ended $SAME_AGAIN")
                    echo "The run has ended, and the same command would only do so again: watch.sh shows why." >&2
                    echo "Start it with other flags by train.sh, and then resume.sh with these." >&2
                    exit "$SAME_AGAIN"
                    ;;
                *ended*)
                    if [ "$left" = 0 ]; then
                        echo "The run has ended $((RESTARTS + 1)) times on this pod: watch.sh shows why." >&2
                        exit 1
                    fi
                    left=$((left - 1))
                    try start "$@"
                    ;;
                *) echo "Worker 0 does not answer: watch.sh shows why." >&2 ;;
            esac
            ;;
        SUSPENDING | SUSPENDED | FAILED)
            left=$RESTARTS
            try again "$@"
            ;;
        *NOT_FOUND*)
            left=$RESTARTS
            try ask "$@"
            ;;
        *) echo "The pod: $state" >&2 ;;
    esac
    sleep 60
done
echo "The run is finished. The pod costs until delete.sh."
