"""`estimate`: exact counts, totals with intervals that hold, and nothing committed."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from scipy import stats

from tests.artifacts import artifacts
from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, refused, usual
from vllm_tasks import InvalidCall, VllmAPI, VllmModel, estimate
from vllm_tasks.datalayer.selection import SourceRow
from vllm_tasks.results import Estimate
from vllm_tasks.tables.estimates import drawn
from vllm_tasks.tables.totals import Total, quantile


def counting(asked: Asked) -> Reply | None:
    """A server's script: as many prompt tokens as the prompt has words, and twice as many in the answer."""
    if not asked.body or "prompt" not in asked.body:
        return None
    reply = usual(asked)
    words = len(asked.prompt.split())
    reply.body["usage"] = {"prompt_tokens": words, "completion_tokens": 2 * words}
    return reply


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> Iterator[VllmAPI]:
    server.script = counting
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, prompt="Say {input}", retries=0) as model:
        yield model


def lengths(rows: int) -> list[int]:
    """Words of the texts: one to forty, most of them short."""
    rng = random.Random(5)
    return [1 + min(int(rng.expovariate(0.2)), 39) for _ in range(rows)]


def fill(place: Place, counts: list[int]) -> None:
    place.fill_texts(*(" ".join([f"t{i}"] * n) for i, n in enumerate(counts)))


# ---------------------------------------------------------------------- the totals


@pytest.mark.parametrize("freedom", [7, 8, 15, 31, 999])
def test_the_quantile_is_students(freedom: int) -> None:
    """As scipy has it."""
    assert quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-4)


@pytest.mark.parametrize("sample", [8, 32, 150])
def test_intervals_hold(sample: int) -> None:
    """Of 2,000 samples of rows of various lengths, about 95 in 100 intervals have the true total."""
    rng = random.Random(7)
    population = [rng.gammavariate(8, 20) for _ in range(300)]
    true = sum(population)
    totals = [Total.of(rng.sample(population, sample), len(population)) for _ in range(2000)]
    held = sum(total.low <= true <= total.high for total in totals)
    assert 0.935 <= held / len(totals) <= 0.965
    assert sum(total.value for total in totals) / len(totals) == pytest.approx(true, rel=0.01)


def test_all_rows_are_no_sample() -> None:
    """Their total is known, so its interval is a point; it is printed alone."""
    assert Total.of([1, 2, 3], 3) == Total(6, 6, 6)
    assert Total.of([], 0) == Total(0, 0, 0)
    assert str(Total(6, 6, 6)) == "6"
    assert str(Total(1234.4, 1000, 2000)) == "1,234 (95 % interval 1,000 to 2,000)"


def test_a_total_is_at_least_that_of_its_sample() -> None:
    """Even if one long row makes the interval wide."""
    assert Total.of([0] * 19 + [1000], 25).low == 1000


def test_each_row_is_drawn_as_often() -> None:
    """Of 20 rows, each is in a quarter of the samples of five, wherever it stands."""
    rng = random.Random(3)
    rows = [SourceRow((i,), (), False, None) for i in range(20)]
    found = [row.key[0] for _ in range(4000) for row in drawn(iter(rows), 5, rng)]
    assert len(found) == 20_000
    assert all(abs(found.count(i) - 1000) < 150 for i in range(20))


# ---------------------------------------------------------------------- the estimate


def test_rows_are_counted_and_tokens_estimated(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """The interval has what the run really takes; nothing is committed, and only the sample is sent."""
    fill(place, counts := lengths(1000))
    prices = {"per_million_prompt_tokens": 2e6, "per_million_completion_tokens": 1e6}
    found = model.estimate("text", "rows", prices=prices)
    assert (found.rows, found.missing, found.sample, found.failed) == (1000, 1000, 32, 0)
    assert len(server.posts) == 32
    with pytest.raises(InvalidCall):
        place.outputs()
    prompts = sum(counts) + 1000
    assert found.prompt_tokens.low < prompts < found.prompt_tokens.high
    assert found.prompt_tokens.low < found.prompt_tokens.value < found.prompt_tokens.high
    assert found.completion_tokens == Total(
        *(pytest.approx(2 * n) for n in dataclasses.astuple(found.prompt_tokens))
    )
    assert found.cost is not None
    assert found.cost.value == pytest.approx(4 * found.prompt_tokens.value)
    assert found.seconds == pytest.approx(found.trial_seconds * 1000 / 32)
    report = model.predict_in_db("text", "rows")
    assert report.prompt_tokens == prompts


def test_done_rows_are_not_counted(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """All missing rows are tried if they are fewer than the sample; without any, nothing is sent."""
    fill(place, counts := lengths(100))
    model.predict_in_db("text", "rows", limit=80)
    done = {row["id"] for row in place.outputs()}
    sent = len(server.posts)
    found = model.estimate("text", "rows")
    assert (found.rows, found.missing, found.sample) == (100, 20, 20)
    exact = sum(n + 1 for i, n in enumerate(counts) if i not in done)
    assert found.prompt_tokens == Total(exact, exact, exact)
    assert found.cost is None
    model.predict_in_db("text", "rows")
    sent = len(server.posts)
    nothing = model.estimate("text", "rows", prices={"per_hour": 1})
    assert (nothing.missing, nothing.sample, nothing.seconds) == (0, 0, 0.0)
    assert nothing.cost == nothing.prompt_tokens == Total(0, 0, 0)
    assert len(server.posts) == sent
    assert str(nothing).splitlines()[1] == "rows to process: 0 of 100"
    assert model.estimate("text", "rows", predict_id="other").missing == 100
    assert model.estimate("text", "rows", temperature=0.5).missing == 100


def test_an_hour_has_its_price(model: VllmAPI, place: Place) -> None:
    """The cost of time is that of the estimated time."""
    fill(place, [3] * 100)
    found = model.estimate("text", "rows", prices={"per_hour": 3600})
    assert found.cost is not None
    assert found.cost.value == pytest.approx(found.seconds)


def test_failed_rows_of_the_trial_are_shown(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """They count no tokens, as in a report; the first reason is there, without what the model said."""
    fill(place, [2] * 8)
    server.script = lambda asked: (
        refused(400, "no such luck") if asked.body and "t3" in asked.prompt else counting(asked)
    )
    found = model.estimate("text", "rows", sample=8)
    assert found.failed == 1
    assert re.match("refused: .*no such luck", found.error or "")
    assert found.prompt_tokens.value == 7 * 3
    assert "failed in the trial: 1 of 8, the first: refused: " in str(found)
    typed = model.model_copy(update={"datatype": "int"})
    none = typed.estimate("text", "rows", sample=8)
    assert (none.failed, none.completion_tokens.value) == (8, 7 * 6)
    assert "Say" not in str(none.error)


def test_an_estimate_is_json(model: VllmAPI, place: Place) -> None:
    """For programs, as the command line prints it."""
    fill(place, [3] * 100)
    data = json.loads(json.dumps(dataclasses.asdict(model.estimate("text", "rows", sample=8))))
    assert data["missing"] == 100
    assert data["prompt_tokens"] == {"value": 400, "low": 262, "high": 538}  # 3/8 of the other 92 rows


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sample": 7}, "sample=7 must be a whole number of rows from 8 to 1000"),
        ({"sample": True}, "sample=True"),
        ({"X": "txt"}, "txt"),
        ({"prices": {"per_day": 1}}, "per_day"),
        ({"primary_key": "x"}, "primary_id"),
    ],
)
def test_wrong_estimates_are_refused(model: VllmAPI, place: Place, wrong: dict[str, Any], words: str) -> None:
    place.fill_texts("a")
    with pytest.raises(InvalidCall, match=words):
        model.estimate(**{"X": "text", "select": "rows", **wrong})


def test_a_server_that_counts_no_tokens_is_refused(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """There is nothing to estimate from."""

    def script(asked: Asked) -> Reply | None:
        if (reply := counting(asked)) is not None:
            del reply.body["usage"]
        return reply

    server.script = script
    place.fill_texts("a")
    with pytest.raises(InvalidCall, match="usage"):
        model.estimate("text", "rows")


@pytest.mark.engine
def test_a_real_engine_counts(local_model: VllmModel, tmp_path: Path) -> None:
    """What vLLM then takes for all rows is within the intervals."""
    place = Place(str(tmp_path / "lake"))
    fill(place, lengths(300))
    found = local_model.estimate("text", "rows", db=place.db)
    report = local_model.predict_in_db("text", "rows", db=place.db)
    assert found.prompt_tokens.low < report.prompt_tokens < found.prompt_tokens.high
    assert found.completion_tokens.low <= report.completion_tokens <= found.completion_tokens.high
    assert 0 < found.trial_seconds < found.seconds


@pytest.mark.usefixtures("prefect_server")
def test_the_task_makes_an_artifact(server: ScriptedServer, tmp_path: Any) -> None:
    """In a flow the estimate appears in Prefect's UI."""
    place = Place(str(tmp_path / "lake"))
    fill(place, [3] * 50)
    server.script = counting
    model = VllmAPI(identifier="guessed", api_url=server.url, db=place.db)

    @flow
    def look() -> Estimate:
        found: Estimate = estimate(model, "text", "rows", 8)
        return found

    found = look()
    (made,) = artifacts("guessed-estimate")
    assert f"| prompt tokens | {found.prompt_tokens} |" in str(made.data)
