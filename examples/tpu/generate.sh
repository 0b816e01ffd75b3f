#!/usr/bin/env bash
# Generate the songs of requests.jsonl in the bucket: each host makes its share, four at once, one on each chip.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

on_all_hosts "acestep-jax generate --batch $BUCKET/requests.jsonl --out-dir $BUCKET/out --checkpoint $BUCKET/turbo \
    --dtype bfloat16 --distributed"
