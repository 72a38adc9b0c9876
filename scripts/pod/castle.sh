#!/usr/bin/env bash
# Castles a pretrained softmax model: copies timm's weights to BUCKET and trains from them: castle.sh [--dry-run] [flags]
# MODEL is one of timm's models on Hugging Face (DeiT-B); CONFIG must fit it (configs/castle_pretrained.py:base).
export CONFIG=${CONFIG:-configs/castle_pretrained.py:base} RUN=${RUN:-castled-deit-base}
source "$(dirname "$0")/common.sh"
bucket
if [[ "$CONFIG" != configs/castle_pretrained.py* ]]; then
    echo "castle.sh: CONFIG must be one of configs/castle_pretrained.py, which has a teacher, not '$CONFIG'." >&2
    exit 2
fi
MODEL=${MODEL:-deit_base_patch16_224.fb_in1k}
WEIGHTS=$BUCKET/weights/$MODEL.safetensors

run curl --location --fail --output "/tmp/$MODEL.safetensors" \
    "https://huggingface.co/timm/$MODEL/resolve/main/model.safetensors"
run gcloud storage cp "/tmp/$MODEL.safetensors" "$WEIGHTS"
scripts/pod/train.sh --config.init_from="$WEIGHTS" --config.distillation.teacher="$WEIGHTS" "$@"
