# acestep-jax on a CPU, for the small model and for trying things out:
#   docker build -f docker/cpu.Dockerfile -t acestep-jax:cpu .
#   docker run --rm --user "$(id -u)" -v acestep:/cache -v "$PWD:/work" acestep-jax:cpu generate "lofi piano" --duration 10 --out song.wav
# The server, see docs/serve.md:
#   docker run --rm -p 127.0.0.1:8001:8001 -v acestep:/cache -e ACESTEP_API_KEY=... acestep-jax:cpu serve --host 0.0.0.0 --data /cache/songs
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY acestep_jax acestep_jax
COPY convert convert
COPY train train
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12.11-slim-bookworm
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "acestep-jax[serve] @ file://$(echo /wheels/acestep_jax-*.whl)" \
    && useradd --create-home --uid 1000 music \
    && install -d -m 1777 /cache /work
# Downloads of the hub, converted weights and compiled programs: a volume here keeps them between runs.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache JAX_PLATFORMS=cpu
VOLUME /cache
USER 1000
WORKDIR /work
ENTRYPOINT ["acestep-jax"]
CMD ["--help"]
