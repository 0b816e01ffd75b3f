# What the other scripts read. Set PROJECT and BUCKET in the environment, or here.
: "${PROJECT:?set PROJECT to your Google Cloud project}"
: "${BUCKET:?set BUCKET to a bucket in the region of ZONE, such as gs://my-music}"
: "${NAME:=acestep}"
: "${ZONE:=us-west4-a}"
: "${ACCELERATOR:=v5litepod-16}" # v5e with 16 chips on 4 hosts; v6e-16 is the same size of v6e
: "${SOURCE:=git+https://github.com/acestep-jax/acestep-jax}"

case "$ACCELERATOR" in
    v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
    v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
    *) : "${RUNTIME:?set RUNTIME to the TPU software version of $ACCELERATOR}" ;;
esac
where=(--project="$PROJECT" --zone="$ZONE")

# Run a command on every host of the slice at once; the status is that of the first host that fails. Compiled programs
# are kept in the bucket, so that hosts and later slices need not compile them again.
on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all \
        --command="export JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled; . venv/bin/activate; $1"
}
