# acestep-jax on NVIDIA GPUs. The CUDA libraries come with JAX's wheels; the host needs a driver and the NVIDIA container toolkit:
#   docker build -f docker/cuda.Dockerfile -t acestep-jax:cuda .
#   docker run --rm --user "$(id -u)" --gpus all -v acestep:/cache -v "$PWD:/work" acestep-jax:cuda generate "lofi piano" --out song.wav
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY acestep_jax acestep_jax
COPY convert convert
COPY train train
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12.11-slim-bookworm
ARG EXTRA=cuda12
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "acestep-jax[$EXTRA,serve] @ file://$(echo /wheels/acestep_jax-*.whl)" \
    && useradd --create-home --uid 1000 music \
    && install -d -m 1777 /cache /work
# Downloads of the hub, converted weights and compiled programs: a volume here keeps them between runs.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
VOLUME /cache
USER 1000
WORKDIR /work
ENTRYPOINT ["acestep-jax"]
CMD ["--help"]
