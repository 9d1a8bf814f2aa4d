# The current stack on the processor: docker build -t lit_glm . && docker run lit_glm train experiment=quickstart
# For NVIDIA: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t lit_glm . && docker run --gpus all ...
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /lit_glm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints/current.txt constraints/current.txt
RUN pip install --no-cache-dir "torch==$(sed -n 's/^torch==//p' constraints/current.txt)" --index-url "$TORCH_INDEX"
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY conf conf
COPY src src
COPY scripts scripts
RUN pip install --no-cache-dir -c constraints/current.txt -e '.[safetensors,nvidia]'
# What `report` calls the image; give the run your own tag with -e LIT_GLM_CONTAINER_IMAGE=...
ENV LIT_GLM_CONTAINER_IMAGE=lit_glm:current
ENTRYPOINT ["lit-glm"]
