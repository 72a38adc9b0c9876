# Shared by the steps. Settings come from the environment; `run` prints a command and, unless --dry-run is given, runs it.
#
#   NAME     the pod's name (castling)
#   ZONE     its zone (us-west4-a)
#   TYPE     its accelerator type: v5litepod-256, v5p-128, v6e-64 ... (v5litepod-256)
#   RUNTIME  its software version; by default the one for TYPE
#   SLICES   the number of pods of that type that train together (1)
#   SPOT     1: Google may take the pod away at any time, and it costs less; 0: on demand (1)
#   BUCKET   gs://... in the same region, for data, runs and exports
#   CONFIG   the configuration, as main.py takes it (configs/deit.py:base)
#   RUN      the run's name; its folder is BUCKET/runs/RUN (deit-base)
set -euo pipefail
SCRIPT=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

NAME=${NAME:-castling} ZONE=${ZONE:-us-west4-a} TYPE=${TYPE:-v5litepod-256} SLICES=${SLICES:-1} SPOT=${SPOT:-1}
CONFIG=${CONFIG:-configs/deit.py:base} RUN=${RUN:-deit-base}
case "$TYPE" in
    v4-*) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
    v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
    *) echo "TYPE must start with v4-, v5litepod-, v5p- or v6e-, not '$TYPE'." >&2 && exit 2 ;;
esac
[[ "$SLICES" =~ ^[1-9][0-9]*$ ]] || { echo "SLICES must be a number from 1 on, not '$SLICES'." >&2 && exit 2; }
# plain VARIABLE PATTERN WORDS: refuses other characters, because a worker's shell reads these settings.
plain() {
    [[ "${!1:-}" =~ ^$2$ ]] || { echo "$(basename "$0"): $1 must be $3, not '${!1}'." >&2 && exit 2; }
}
plain NAME '[a-z][a-z0-9-]*' "lower-case letters, digits and -"
plain RUN '[A-Za-z0-9._-]+' "letters, digits, '.', '_' and '-'"
CODE=castling_jax       # the clone, in every worker's home
TRAINING="^[^ ]*python main.py .*--workdir=${BUCKET:-}/runs/$RUN( |$)"  # pgrep finds the run by this
MOUNT=/mnt/castling     # where every worker sees BUCKET: ArrayRecord files are read from a disk

# --dry-run and --help may stand anywhere. The environment passes DRY_RUN on to the steps that a step starts.
export DRY_RUN=${DRY_RUN:-0}
for word in "$@"; do
    shift
    case "$word" in
        --dry-run) DRY_RUN=1 ;;
        --help)
            sed -n '2,/^source/s/^# \{0,1\}//p' "$SCRIPT"
            echo "Settings, from the environment:"
            sed -n '3,/^set/s/^# \{0,1\}//p' "$(dirname "$SCRIPT")/common.sh"
            exit
            ;;
        *) set -- "$@" "$word" ;;
    esac
done

# no_flags "$@": refuses other words in a step that takes no flags: a mistyped --dry-run must not delete a pod.
no_flags() {
    [ $# = 0 ] || { echo "$(basename "$0"): there is no flag '$1', only --dry-run and --help." >&2 && exit 2; }
}

# run COMMAND...: prints the command as one can type it, and runs it.
run() {
    local word line=
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        line+="${line:+ }$word"
    done
    echo "$line"
    [ "$DRY_RUN" = 1 ] || "$@"
}

# need VARIABLE WORDS: refuses to go on without this setting.
need() {
    [ -n "${!1:-}" ] || { echo "$(basename "$0"): set $1, $2." >&2 && exit 2; }
}

bucket() {
    need BUCKET "the bucket for everything, such as gs://my-bucket"
    [[ "$BUCKET" == gs://* ]] || { echo "$(basename "$0"): BUCKET must start with gs://, not '$BUCKET'." >&2 && exit 2; }
    plain BUCKET 'gs://[a-z0-9._-]+(/[A-Za-z0-9._-]+)*' "gs://NAME or gs://NAME/FOLDER, of letters, digits, '.', '_' and '-'"
}

# nodes: the names of all slices.
nodes() {
    if [ "$SLICES" = 1 ]; then echo "$NAME"; else seq -f "$NAME-%g" 0 $((SLICES - 1)); fi
}

# on_workers NODE all|0 COMMAND: runs the command on all workers of a node, or on worker 0.
on_workers() {
    run gcloud compute tpus tpu-vm ssh "$1" --zone="$ZONE" --worker="$2" --command="$3"
}

# everywhere COMMAND: runs the command on every worker of every slice.
everywhere() {
    local node
    for node in $(nodes); do
        on_workers "$node" all "$1"
    done
}

describe=(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" "--format=value(state.state)")
