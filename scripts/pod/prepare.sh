#!/usr/bin/env bash
# Prepares ImageNet on this machine, and copies it to BUCKET: ARCHIVES=FOLDER prepare.sh [--dry-run]
# ARCHIVES has ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar. DATA (~/tensorflow_datasets) needs 300 GB.
source "$(dirname "$0")/common.sh"
no_flags "$@"
bucket
need ARCHIVES "the folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
DATA=${DATA:-$HOME/tensorflow_datasets}

run python3 -m venv .venv
run .venv/bin/python -m pip install --quiet -e ".[tf]"
run .venv/bin/python -m castling_jax prepare imagenet2012 --data_dir="$DATA" --manual_dir="$ARCHIVES"
run gcloud storage rsync --recursive "$DATA/imagenet2012" "$BUCKET/tensorflow_datasets/imagenet2012"
