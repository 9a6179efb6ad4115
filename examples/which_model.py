"""The model that the examples call: one on any vLLM server with `--api-url`, else the demo's small model."""

from __future__ import annotations

import argparse
import os
from typing import Any

from vllm_tasks import VllmAPI, VllmModel


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the command line that all examples share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--api-url",
        default=os.environ.get("VLLM_TASKS_API_URL", ""),
        help="a vLLM server, such as http://127.0.0.1:8000; empty: run SmolLM2-135M here, like `make demo`",
    )
    return parser


def make_model(api_url: str = "", **fields: Any) -> VllmAPI | VllmModel:
    """Return a model with these fields, greedy by default; without a URL, this process runs the engine."""
    fields = {"identifier": "example", "predict_kwargs": {"temperature": 0, "max_tokens": 40}, **fields}
    if api_url:
        return VllmAPI(api_url=api_url, **fields)
    from flows.smollm2 import model_folder, number_type

    engine = {
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 2**30,
        "enforce_eager": True,
        "dtype": number_type(),
    }
    return VllmModel(model_name=str(model_folder()), vllm_kwargs=engine, **fields)
