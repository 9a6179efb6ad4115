"""The groups of sides: engines of one's own, for texts and for numbers, and clients of one server."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from benchmarks import servers
from benchmarks.children import Child
from benchmarks.peers import (
    bad_rows,
    ceilings,
    clients,
    environments,
    foreign,
    harnessed,
    own_engine,
    rays,
    run_batch,
)
from benchmarks.peers.bad_rows import Ending
from benchmarks.peers.field import Field, say
from benchmarks.peers.plan import (
    DUPLICATES,
    EMBED,
    MIXED,
    PARAMETERS,
    PREFIXES,
    SCORE,
    SHORT,
    Plan,
)

ENGINES, CLIENTS = "Peers with an engine each", "Peers as clients of one server"
EMBEDDERS = "Peers that embed and score"
DIFFERENT = "Peers and rows that differ"
RESIDENT = (ceilings.GENERATE, own_engine.BATCHES, ceilings.ASYNC, own_engine.TABLE)
ALL_ENGINES = (*RESIDENT, ceilings.CHUNKS, rays.ENGINE, run_batch.NAME)
ANY_LENGTH = (ceilings.GENERATE, own_engine.BATCHES, ceilings.ASYNC, rays.ENGINE)
"""Engines that accept a different output length for each row."""
OWN_PARAMETERS = (ceilings.GENERATE, ceilings.ASYNC, own_engine.TABLE, rays.ENGINE)
FOREIGN = tuple(foreign.NAMES.values())
OLDER = (clients.THREADS, clients.CHUNKS)
QUICK = (clients.BENCH, clients.OURS)
ALL_CLIENTS = (*QUICK, own_engine.TABLE, *FOREIGN, harnessed.NAME, rays.HTTP, *OLDER)
SLOW = 0.125
"""The fraction of the rows that the older ways get; their rates are compared."""
TOKENS = re.compile(r"^vllm:generation_tokens_total\{.*\} (\S+)$", re.MULTILINE)


@contextmanager
def engines(plan: Plan, arguments: dict[str, Any], title: str = ENGINES) -> Iterator[Field]:
    """Sides with an engine each, resident if possible; one works at a time."""
    with ExitStack() as stack:
        field = Field(title, plan, stack)
        field.start([ceilings.GENERATE, ceilings.CHUNKS], ceilings.serve_llm, arguments)
        field.start([ceilings.ASYNC], ceilings.serve_async, arguments)
        field.start([own_engine.BATCHES, own_engine.TABLE], own_engine.serve, arguments)
        if not plan.short:
            environments.prepare("ray")
            field.start([rays.ENGINE, rays.TOLERANT], rays.serve_engine, arguments)
            field.start([run_batch.NAME], run_batch.serve, arguments)
        for name in field.here([ceilings.CHUNKS]):
            field.sides[name].fraction = SLOW
        yield field


def measure_engines(field: Field, after_each: Callable[[], None]) -> list[Ending]:
    """Measure the workloads of rows with the same parameters, but for the length."""
    field.warm_up(RESIDENT)
    with_ray = (*RESIDENT, rays.ENGINE)
    for workload, names, once in (
        (SHORT, ALL_ENGINES, run_batch.NAME),
        (MIXED, ANY_LENGTH, rays.ENGINE),
        (PREFIXES, with_ray, rays.ENGINE),
        (DUPLICATES, with_ray, rays.ENGINE),
    ):
        field.measure(workload, names, once=[once])
        after_each()
    return []


def measure_rows(field: Field, after_each: Callable[[], None]) -> list[Ending]:
    """Measure rows with parameters of their own, then the bad row, which some sides do not survive."""
    field.warm_up(RESIDENT)
    field.measure(PARAMETERS, OWN_PARAMETERS, once=[rays.ENGINE])
    after_each()
    return bad_rows.observe(field, (*reversed(RESIDENT), rays.ENGINE, rays.TOLERANT, run_batch.NAME))


@contextmanager
def pooling(plan: Plan, arguments: dict[str, Any]) -> Iterator[Field]:
    """Sides with an engine each that gives vectors and scores: the model's last hidden states, averaged."""
    arguments = {**arguments, "runner": "pooling", "convert": "embed"}
    arguments.pop("generation_config", None)
    with ExitStack() as stack:
        field = Field(EMBEDDERS, plan, stack)
        field.start([ceilings.EMBED, ceilings.SCORE], ceilings.serve_pooling, arguments)
        field.start([own_engine.BATCHES, own_engine.TABLE], own_engine.serve_pooling, arguments)
        if not plan.short:
            environments.prepare("ray")
            field.start([rays.ENGINE], rays.serve_embedding, arguments)
            field.start([run_batch.NAME], run_batch.serve, arguments)
        yield field


def measure_pooling(field: Field, after_each: Callable[[], None]) -> list[Ending]:
    """Measure vectors and scores. The resident sides first do some rows that do not count."""
    started_each_time = (rays.ENGINE, run_batch.NAME)
    for workload, bare, more in (
        (EMBED, ceilings.EMBED, started_each_time),
        (SCORE, ceilings.SCORE, (run_batch.NAME,)),
    ):
        resident = (bare, own_engine.BATCHES, own_engine.TABLE)
        field.warm_up(resident, workload)
        field.measure(workload, (*resident, *more), once=more)
        after_each()
    return []


@contextmanager
def clients_of_one_server(plan: Plan, arguments: dict[str, Any]) -> Iterator[Field]:
    """Clients of a vLLM server, all with the same number of rows in flight; one works at a time.

    The server does not cache prefixes, since all clients send the same prompts. Its chat template returns a
    message unchanged, since some clients send only chat messages.
    """
    if not any(map(plan.has_side, ALL_CLIENTS)):
        yield Field(CLIENTS, plan, ExitStack())
        return
    extra = {"enable_prefix_caching": False, "chat_template": run_batch.PLAIN}
    with ExitStack() as stack:
        say("starting the server")
        server = stack.enter_context(Child(servers.serve, {**arguments, **extra}))
        url, model, flight = server.ready, arguments["model"], plan.options.concurrency
        field = Field(CLIENTS, plan, stack, partial(tokens_made, url))
        field.start([clients.OURS, own_engine.TABLE], clients.serve_ours, url, flight)
        field.start([clients.BENCH], clients.serve_bench, url, model, flight)
        field.start(OLDER, clients.serve_older, url, model)
        if not plan.short:
            environments.prepare("ray")
            for name, title in foreign.NAMES.items():
                environments.prepare(name)
                field.start([title], foreign.serve, name, url, model, flight)
            field.start([harnessed.NAME], harnessed.serve, url, model, flight)
            field.start([rays.HTTP], rays.serve_http, url, model, flight)
        for name in field.here(OLDER):
            field.sides[name].fraction = SLOW
        yield field


def measure_clients(field: Field, after_each: Callable[[], None]) -> list[Ending]:
    """Measure the workloads of clients, then the bad row."""
    field.warm_up((*QUICK, *FOREIGN))
    field.measure(SHORT, ALL_CLIENTS)
    after_each()
    field.measure(MIXED, QUICK)
    after_each()
    return bad_rows.observe(field, ALL_CLIENTS)


def tokens_made(url: str) -> int:
    """The number of output tokens that the server has counted so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        found = TOKENS.findall(page.read().decode())
    return round(sum(map(float, found)))
