#!/usr/bin/env bash
# Install the package on every host. The images come with Python 3.10, so uv fetches a newer one.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="
    set -e
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --clear --python 3.12 venv
    ~/.local/bin/uv pip install --python venv/bin/python 'acestep-jax[tpu,train,gcs] @ $SOURCE'"
