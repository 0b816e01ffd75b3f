#!/usr/bin/env bash
# Encode the songs in the bucket, each host its share, on one chip.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

on_all_hosts "acestep-jax train preprocess $BUCKET/songs $BUCKET/data --checkpoint $BUCKET/turbo \
    --dtype bfloat16 --crop-seconds 60 --distributed"
