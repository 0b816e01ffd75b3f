#!/usr/bin/env bash
# Fine-tune all weights of the transformer, split over the 16 chips; or an adapter, with METHOD=lora.
set -euo pipefail
. "$(dirname "$0")/settings.sh"

case "${METHOD:=full}" in
    full) settings="--mesh fsdp=16 --optimizer.learning-rate 1e-5" ;;
    lora) settings="--mesh data=16" ;;
    *) echo "METHOD: expected full or lora, found $METHOD" >&2 && exit 2 ;;
esac
on_all_hosts "acestep-jax train fit --data $BUCKET/data --checkpoint $BUCKET/turbo --out $BUCKET/run-$METHOD \
    --method $METHOD $settings --dtype bfloat16 --examples.batch-size 16 --optimizer.accumulation 1 --distributed"
