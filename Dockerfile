# racdeploy on CPUs, as a user without rights.
#
#   docker build -t racdeploy .                                    looks into files, exports, pushes and pulls
#   docker build -t racdeploy --build-arg EXTRAS=llamacpp .        runs and verifies GGUF bundles
#   docker build -t racdeploy --build-arg EXTRAS=all .             prunes, exports and verifies
#   docker run --rm -v "$PWD:/work" racdeploy inspect model.gguf
#
# Git is left out of the image's context, so name the version: --build-arg VERSION=0.1.0.
FROM python:3.12-slim AS build
ARG EXTRAS=""
ARG VERSION=""
# Wheels that nobody has to compile: torch without CUDA, and llama-cpp-python where its project built one.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG LLAMA_INDEX=https://abetlen.github.io/llama-cpp-python/whl/cpu

RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ git make \
    && rm -rf /var/lib/apt/lists/*

COPY . /source
RUN if [ -n "$VERSION" ]; then export SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION"; fi \
    && python -m venv /opt/racdeploy \
    && /opt/racdeploy/bin/pip install --no-cache-dir \
        --extra-index-url "$TORCH_INDEX" --extra-index-url "$LLAMA_INDEX" \
        "/source${EXTRAS:+[$EXTRAS]}"

FROM python:3.12-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 racdeploy \
    && mkdir /work \
    && chown racdeploy /work

COPY --from=build /opt/racdeploy /opt/racdeploy
ENV PATH=/opt/racdeploy/bin:$PATH
USER racdeploy
WORKDIR /work
ENTRYPOINT ["racdeploy"]
CMD ["--help"]
