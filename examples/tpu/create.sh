#!/usr/bin/env bash
# Request the slice and wait until it is there. SPOT=1 requests one that Google may take back at any time.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+--spot}
until [ "$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)')" = ACTIVE ]; do
    sleep 30
done
