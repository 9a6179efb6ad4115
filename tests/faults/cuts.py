"""Networks that fail: a proxy between the model and the scripted server, or PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import URL

from tests.faults.ground import Ground
from tests.faults.kills import slowly
from tests.faults.ledger import Figures
from tests.faults.proxy import Proxy
from tests.servers.scripted_server import ScriptedServer

SHARE = 0.1
"""Of the answers that are treated."""
RARE = 0.03
"""Of what PostgreSQL says: a commit has some ten answers."""
IMPATIENT = {"timeout": 1.0, "retries": 5}


def cut(ground: Ground, kind: str, *faults: str, rows: int = 400) -> Figures:
    """Some responses meet one of `faults`; rows that end as errors are processed again at the end.

    Each such response may cost one request more, and a failed row another one.
    """
    name = f"network: {', '.join(faults)}"
    chance = ground.chance(f"{name} {kind}")
    with ScriptedServer(slowly(chance)) as server, Proxy(server.port, chance, SHARE, *faults) as proxy:
        run = ground.run_of(name, ground.place(kind), server, rows)
        run.fields = {"api_url": proxy.url, **IMPATIENT}
        run.finish(ground.jobs)
        errors = {row["id"]: row["_error"] for row in run.ledger.committed() if row["_error"]}
        assert {error.partition(":")[0] for error in errors.values()} <= {"timeout", "connection"}, errors
        for i, fault in enumerate(proxy.done):
            run.ledger.fault(f"{fault}, the {i}th")
        run.ledger.spare = len(proxy.done)
        run.ledger.due.update(list(errors))
        proxy.share = 0
        if errors:
            run.finish(ground.jobs, retry_failed=True)
        run.undisturbed(ground.jobs)
        return run.ledger.check()


def cut_database(ground: Ground, rows: int = 600) -> Figures:
    """Connections break at any point, even during the acknowledgement of a commit: nothing is sent again."""
    name = "network to PostgreSQL: reset, half an answer"
    chance = ground.chance(name)
    place = ground.place("postgres")
    url = sa.make_url(place.url)
    with (
        ScriptedServer(slowly(chance)) as server,
        Proxy(f"{url.query['host']}/.s.PGSQL.5432", chance, RARE, "reset", "half a body") as proxy,
    ):
        run = ground.run_of(name, place, server, rows)
        cut = URL.create(url.drivername, url.username, None, "127.0.0.1", proxy.port, url.database)
        run.fields = {"db": {"url": cut.render_as_string()}}
        run.go_on(ground.jobs, run.start(ground.jobs), "the first call")
        for i, fault in enumerate(proxy.done):
            run.ledger.fault(f"{fault}, the {i}th")
        proxy.share = 0
        run.undisturbed(ground.jobs)
        return run.ledger.check()
