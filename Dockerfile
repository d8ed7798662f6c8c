# Two images: `api` (neither torch nor ray) and `worker` (dispatcher, Ray head, Ray workers).
#
#   docker build --target api    -t ddpsweep-api .
#   docker build --target worker -t ddpsweep-worker .
#
# `make image` builds both for real and tries them out, with docker or with buildah.

# Anything with python3 >= 3.11 and its venv module will do, a bare Debian with python3-venv included.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm


# The package as a wheel: the sources stay behind in this stage.
FROM ${BASE_IMAGE} AS wheel
# By this label, deploy/image finds what this stage leaves behind.
LABEL ddpsweep.stage=wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY requirements ./requirements
COPY ddpnopt ./ddpnopt
COPY workers ./workers
COPY service ./service
COPY migrations ./migrations
# pip's own settings (an index, wheels on a disk) come in as a secret, so that none of them stay in a layer.
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /tmp/build \
    && /tmp/build/bin/pip wheel --no-deps --wheel-dir /dist .


# What both images share. Dependencies are a layer of their own: a change of the code leaves it alone.
FROM ${BASE_IMAGE} AS service
ENV PATH=/opt/ddpsweep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DDPSWEEP_HOME=/var/lib/ddpsweep
# A fixed number, so that the owner of files in a volume outlives the image and runAsNonRoot can be checked.
RUN groupadd --gid 10001 ddpsweep \
    && useradd --uid 10001 --gid ddpsweep --home-dir /home/ddpsweep --create-home --shell /usr/sbin/nologin ddpsweep \
    && install --directory --owner ddpsweep --group ddpsweep --mode 0750 /var/lib/ddpsweep /checkpoints
COPY constraints.txt requirements/service.txt requirements/postgres.txt /opt/requirements/
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/ddpsweep \
    && pip install -c /opt/requirements/constraints.txt \
        -r /opt/requirements/service.txt -r /opt/requirements/postgres.txt
WORKDIR /var/lib/ddpsweep


FROM service AS numerics
# The fast path is compiled where it runs, for that machine's processor.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/numerics.txt requirements/cluster.txt /opt/requirements/
# The package index's own torch brings several GB of CUDA along, hence PyTorch's CPU index. For GPUs name
# another one (https://download.pytorch.org/whl/cu130); empty leaves the choice to pip's settings.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
# torch alone comes from that index: what it depends on is pinned to releases that the index may lack.
RUN --mount=type=secret,id=pip-conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    { test -z "${TORCH_INDEX_URL}" \
        || pip install --no-deps --index-url "${TORCH_INDEX_URL}" -c /opt/requirements/constraints.txt torch; } \
    && pip install -c /opt/requirements/constraints.txt \
        -r /opt/requirements/numerics.txt -r /opt/requirements/cluster.txt


FROM numerics AS worker
LABEL org.opencontainers.image.title="ddpsweep-worker" \
      org.opencontainers.image.description="DDPSweep's dispatcher and Ray nodes" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=wheel /dist /opt/dist
# --no-deps: the lists above are all there is.
RUN pip install --no-cache-dir --no-index --no-deps /opt/dist/*.whl
USER 10001:10001
CMD ["ddpsweep", "serve", "--role", "dispatcher"]


# Last, so that a build that names no target gives the image that faces users.
FROM service AS api
LABEL org.opencontainers.image.title="ddpsweep-api" \
      org.opencontainers.image.description="DDPSweep's API and dashboard; no torch, no ray" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=wheel /dist /opt/dist
RUN pip install --no-cache-dir --no-index --no-deps /opt/dist/*.whl
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# With authentication off the server refuses every address but loopback, this one included, unless
# DDPSWEEP_ALLOW_UNAUTHENTICATED=1 says that something in front of the container protects it.
CMD ["ddpsweep", "serve", "--role", "api", "--host", "0.0.0.0", "--port", "8000"]
