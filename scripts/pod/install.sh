#!/usr/bin/env bash
# Installs castling_jax on all workers, and mounts BUCKET there for its data: install.sh [--dry-run]
# REPOSITORY is the address that workers clone (this clone's origin), REVISION the commit they check out (this clone's).
source "$(dirname "$0")/common.sh"
no_flags "$@"
bucket
REPOSITORY=${REPOSITORY:-$(git remote get-url origin 2> /dev/null || true)}
REVISION=${REVISION:-$(git rev-parse HEAD 2> /dev/null || echo origin/HEAD)}
need REPOSITORY "an address that the workers can clone, such as https://github.com/YOU/castling_jax"
plain REVISION '[A-Za-z0-9._/-]+' "a commit, a branch or a tag"

# The Python of the pods' system is older than 3.11, so uv brings another.
everywhere "curl -LsSf https://astral.sh/uv/install.sh | sh; \
[ -d $CODE ] || git clone --quiet $(printf %q "$REPOSITORY") $CODE; \
cd $CODE && git fetch --quiet && git checkout --quiet --detach $REVISION \
&& ~/.local/bin/uv venv --quiet --clear --python 3.12 .venv && ~/.local/bin/uv pip install --quiet -e '.[tpu]'"
place=${BUCKET#gs://} only_dir=
[[ "$place" != */* ]] || only_dir="--only-dir ${place#*/} "
# A new machine updates itself first, so apt-get waits for the lock.
everywhere "curl -s https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null; \
echo deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main \
| sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null; \
sudo apt-get -o DPkg::Lock::Timeout=600 update -qq && sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq gcsfuse; \
sudo mkdir -p $MOUNT && sudo chown \$USER $MOUNT && (mountpoint -q $MOUNT || gcsfuse -o ro --implicit-dirs $only_dir${place%%/*} $MOUNT)"
everywhere "cd $CODE && .venv/bin/python -c 'import importlib.metadata; print(importlib.metadata.version(\"jax\"))'"
