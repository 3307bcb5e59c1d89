# Everything from the Python package index. Build and try:
#   docker build -t ds-lvxattn .
#   docker run --gpus all --ipc host -v "$PWD/runs:/workspace/runs" ds-lvxattn finetune --ds_config ds_configs/quickstart.json
FROM python:3.11-slim-bookworm

# A compiler and Python's headers, for the operators that Triton and DeepSpeed build at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY ds_lvxattn ds_lvxattn
COPY ds_configs ds_configs
# torch first and pinned: without it the other packages would pull whatever build is newest.
RUN pip install --no-cache-dir -c constraints.txt torch setuptools wheel ninja \
    && pip install --no-cache-dir -c constraints.txt ".[quickstart,cuda,lora]"

RUN useradd --create-home --uid 1000 trainer && mkdir runs && chown trainer runs
USER 1000
ENTRYPOINT ["ds-lvxattn"]
CMD ["--help"]
