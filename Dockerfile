# The image for docker and kubernetes pools: vLLM's own image, with this package and a Prefect that fits.
#
#   docker build -t REGISTRY/vllm-tasks .
#   make pools ARGS="--gpu-type kubernetes --gpus 8 --image REGISTRY/vllm-tasks"
FROM vllm/vllm-openai:v0.32.0

# Extras of pyproject.toml; add others, such as vllm,s3,postgres.
ARG EXTRAS=vllm
WORKDIR /opt/vllm-tasks
COPY pyproject.toml README.md LICENSE ./
COPY vllm_tasks vllm_tasks
RUN uv pip install --system --no-cache ".[${EXTRAS}]"

# The entrypoint of vLLM's image is its server; here the worker sets the command.
ENTRYPOINT []
CMD ["prefect", "version"]
