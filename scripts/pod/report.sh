#!/usr/bin/env bash
# Compiles CONFIG for TOPOLOGY on this machine, with no TPU, and reports its memory and the time of a step.
# TOPOLOGY=v5e:16x16 report.sh [--dry-run] [--mesh=data:64,fsdp:4 ...]
source "$(dirname "$0")/common.sh"
need TOPOLOGY "the pod's shape, such as v5e:16x16"

run python3 -m venv .venv
run .venv/bin/python -m pip install --quiet -e . "jax[tpu]"
run .venv/bin/python -m castling_jax report --config="$CONFIG" --topology="$TOPOLOGY" "$@"
