#!/usr/bin/env bash
# Requests the pod, or SLICES pods, and waits until it is ready: create.sh [--dry-run]
source "$(dirname "$0")/common.sh"
no_flags "$@"

named=(--node-id="$NAME")
[ "$SLICES" = 1 ] || named=(--node-count="$SLICES" --node-prefix="$NAME")
[ "$SPOT" = 0 ] || named+=(--spot)
run gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${named[@]}"
run "${describe[@]}"
[ "$DRY_RUN" = 1 ] && exit
until state=$("${describe[@]}") && [ "$state" = ACTIVE ]; do
    case "$state" in
        FAILED | SUSPENDED) echo "The request has failed: delete.sh removes it." >&2 && exit 1 ;;
    esac
    sleep 30
done
