"""Servers that misbehave: storms of refusals, rows that always fail, invalid responses."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from tests.faults.ground import Ground
from tests.faults.ledger import Figures, Ledger
from tests.servers.scripted_server import Asked, Deed, Reply, ScriptedServer, refused, usual

HTML = Reply(b"<html><body>Sign in to the network</body></html>", 200, {"Content-Type": "text/html"})
BEGINS = 60
"""Requests before a storm."""
LASTS = 1.5
"""Seconds from its first refusal."""
ILL = 0.03
"""The share of rows that always fail."""
RETRIES = 8
"""So many that no row is given up in a storm."""


@dataclass
class Storm:
    """A script that does `deed` to all requests for a while, and records it in the ledger."""

    deed: Callable[[Asked], Reply]
    of_health: bool = False
    """Whether the server says of itself that it is ill as long as it lasts."""
    ledger: Ledger | None = None
    came: int = 0
    done: int = 0
    since: float | None = None

    def __call__(self, asked: Asked) -> Deed:
        if asked.body is None:
            ill = self.of_health and self.blows and asked.path == "/health"
            return Reply(status=503) if ill else None
        self.came += 1
        if self.came == BEGINS:
            self.since = asked.at
        if not self.blows:
            return None
        assert self.ledger is not None
        self.done += 1
        self.ledger.due[int(asked.prompt[1:])] += 1
        return self.deed(asked)

    @property
    def blows(self) -> bool:
        return self.since is not None and time.monotonic() < self.since + LASTS


def too_many(chance: random.Random) -> Callable[[Asked], Reply]:
    """Responds 429, sometimes with a Retry-After."""

    def deed(_: Asked) -> Reply:
        headers = {"Retry_After": "0.1"} if chance.random() < 0.5 else {}
        return refused(429, "too many requests", **headers)

    return deed


def storm(ground: Ground, kind: str, name: str, script: Storm) -> Figures:
    """Temporary refusals: nothing fails, and each costs one more request."""
    with ScriptedServer(script) as server:
        run = ground.run_of(f"server: {name}", ground.place(kind), server)
        run.fields = {"retries": RETRIES}
        script.ledger = run.ledger
        run.finish(ground.jobs)
        for i in range(script.done):
            run.ledger.fault(f"{name}, the {i}th")
        run.undisturbed(ground.jobs)
        return run.ledger.check()


def tell_too_many(ground: Ground, kind: str) -> Figures:
    return storm(ground, kind, "storm of 429", Storm(too_many(ground.chance(f"429 {kind}"))))


def is_away(ground: Ground, kind: str) -> Figures:
    return storm(
        ground, kind, "storm of 503, ill", Storm(lambda _: refused(503, "engine dead"), of_health=True)
    )


def is_busy(ground: Ground, kind: str) -> Figures:
    return storm(ground, kind, "storm of 503, well", Storm(lambda _: refused(503, "overloaded")))


@dataclass
class Ill:
    """A script that does `deed` to certain rows forever."""

    rows: Collection[int]
    deed: Callable[[Asked], Reply]
    done: list[int] = field(default_factory=list)

    def __call__(self, asked: Asked) -> Deed:
        if asked.body is None or (key := int(asked.prompt[1:])) not in self.rows:
            return None
        self.done.append(key)
        return self.deed(asked)


def rows_fail(ground: Ground, kind: str, name: str, deed: Callable[[Asked], Reply], retries: int) -> Figures:
    """Rows that always fail end as errors after a fixed number of requests, and no other row suffers."""
    name = f"server: {name}"
    chance = ground.chance(f"{name} {kind}")
    with ScriptedServer() as server:
        run = ground.run_of(name, ground.place(kind), server)
        run.fields = {"retries": retries}
        ill = Ill(chance.sample(range(run.ledger.rows), int(ILL * run.ledger.rows)), deed)
        server.script = ill
        run.finish(ground.jobs)
        for key in ill.done:
            run.ledger.fault(f"row {key}")
        run.ledger.due.update(dict.fromkeys(ill.rows, retries))
        if retries:  # before a row is blamed, one that completed must complete again: at most once for each
            run.ledger.spare = len(ill.rows)
        run.undisturbed(ground.jobs)
        return run.ledger.check(failed=ill.rows)


def fails_for_ever(ground: Ground, kind: str) -> Figures:
    return rows_fail(ground, kind, "500 for certain rows for ever", lambda _: refused(500, "no"), retries=2)


def answers_html(ground: Ground, kind: str) -> Figures:
    return rows_fail(ground, kind, "HTML with 200", lambda _: HTML, retries=0)


def miscounts(ground: Ground, kind: str) -> Figures:
    """Responds with no choice, or with two instead of one."""
    chance = ground.chance(f"choices {kind}")

    def deed(asked: Asked) -> Reply:
        body = usual(asked).body
        return Reply({**body, "choices": body["choices"] * chance.choice((0, 2))})

    return rows_fail(ground, kind, "wrong number of choices", deed, retries=0)


def names_another_model(ground: Ground, kind: str) -> Figures:
    """The responding model's name is recorded with each row; the answer counts."""
    told = "another-model"

    def deed(asked: Asked) -> Reply | None:
        return Reply({**usual(asked).body, "model": told}) if asked.body and odd(asked) else None

    with ScriptedServer(deed) as server:
        run = ground.run_of("server: another model's name", ground.place(kind), server)
        run.finish(ground.jobs)
        run.ledger.fault("every second row")
        run.undisturbed(ground.jobs, deed)
        figures = run.ledger.check()
        names = {row["id"] % 2: row["_model"] for row in run.ledger.committed()}
        assert names[1] == told != names[0], names
        return figures


def odd(asked: Asked) -> bool:
    return bool(int(asked.prompt[1:]) % 2)


def forgets_its_model(ground: Ground, kind: str) -> Figures:
    """A 404 is an error of the call: it stops with its results, and the same call resumes."""
    lost = Storm(lambda _: refused(404, "The model does not exist."))
    with ScriptedServer(lost) as server:
        run = ground.run_of("server: wrong model (404)", ground.place(kind), server)
        lost.ledger = run.ledger
        assert ground.jobs.wait(run.start(ground.jobs)) != 0
        run.ledger.death("the first 404")
        server.script = lambda _: None
        run.finish(ground.jobs)
        run.undisturbed(ground.jobs)
        return run.ledger.check()
