#!/usr/bin/env bash
# Delete the slice, which costs money until then. The bucket stays.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
