#!/usr/bin/env bash
# Installs castling_jax on all workers, and mounts BUCKET there to read data from: install.sh [--dry-run]
source "$(dirname "$0")/common.sh"
bucket
REPOSITORY=${REPOSITORY:-$(git remote get-url origin 2>/dev/null || echo https://github.com/YOUR_NAME/castling_jax)}

# The pods' system has an older Python than 3.11, so uv brings one.
everywhere "curl -LsSf https://astral.sh/uv/install.sh | sh; \
git clone --quiet $REPOSITORY $CODE || git -C $CODE pull --quiet; \
cd $CODE && ~/.local/bin/uv venv --quiet --clear --python 3.12 .venv && ~/.local/bin/uv pip install --quiet -e '.[tpu]'"
everywhere "curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null; \
echo deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main \
| sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null; \
sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse; \
sudo mkdir -p $MOUNT && sudo chown \$USER $MOUNT && (mountpoint -q $MOUNT || gcsfuse -o ro --implicit-dirs ${BUCKET#gs://} $MOUNT)"
everywhere "cd $CODE && .venv/bin/python -c 'import jax; print(jax.__version__)'"
