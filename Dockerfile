# The image for docker and kubernetes pools: vLLM's own, with this package and a Prefect that fits beside it.
#
#   docker build -t REGISTRY/vllm-tasks .
#   make pools ARGS="--gpu-type kubernetes --gpus 8 --image REGISTRY/vllm-tasks"
FROM vllm/vllm-openai:v0.32.0

# More of pyproject.toml's extras, such as vllm,s3,postgres.
ARG EXTRAS=vllm
WORKDIR /opt/vllm-tasks
COPY pyproject.toml README.md ./
COPY vllm_tasks vllm_tasks
COPY flows flows
RUN uv pip install --system --no-cache ".[$EXTRAS]"

# The image's own entrypoint is a server; workers say what to run.
ENTRYPOINT []
CMD ["prefect", "version"]
