# The image for docker and kubernetes pools: vLLM's own image, with this package in an environment of its own.
#
#   docker build -t REGISTRY/vllm-tasks .
#   make pools ARGS="--gpu-type kubernetes --gpus 8 --image REGISTRY/vllm-tasks"
FROM vllm/vllm-openai:v0.32.0

# Extras of pyproject.toml, without `vllm`; add others, such as eval,s3,postgres.
ARG EXTRAS=eval
WORKDIR /opt/vllm-tasks
COPY pyproject.toml README.md LICENSE ./
COPY vllm_tasks vllm_tasks
RUN uv venv --no-cache .venv && uv pip install --python .venv --no-cache ".[${EXTRAS}]"
ENV PATH=/opt/vllm-tasks/.venv/bin:$PATH VLLM_TASKS_ENGINE_PYTHON=/usr/bin/python3

# The entrypoint of vLLM's image is its server; here the worker sets the command.
ENTRYPOINT []
CMD ["prefect", "version"]
