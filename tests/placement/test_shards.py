"""Parts of a table by a hash of the key, and several flow runs reported as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer, answer_to
from vllm_tasks import GateFailed, InvalidCall, VllmAPI
from vllm_tasks.artifacts import markdown_of
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.placement import payload
from vllm_tasks.results import Report
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.report import ErrorKind, FailedRow
from vllm_tasks.validation.report import ValidationReport


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> VllmAPI:
    return VllmAPI(identifier="m", api_url=server.url, db=place.db, model="x")


@pytest.mark.parametrize("key", ["id", ["text", "id"]])
def test_shards_are_disjoint_and_together_the_table(
    model: VllmAPI, place: Place, server: ScriptedServer, key: str | list[str]
) -> None:
    """Each row is in one of three shards, of about the same size, also with a key of several columns."""
    texts = [f"t{i}" for i in range(300)]
    place.fill_texts(*texts)
    reports = [model.predict_in_db("text", "rows", primary_id=key, shard=(i, 3)) for i in range(3)]
    assert [r.processed for r in reports] == [r.rows for r in reports]
    assert sum(r.processed for r in reports) == 300
    assert min(r.processed for r in reports) > 50
    assert place.answers() == {i: answer_to(text) for i, text in enumerate(texts)}
    assert len(server.posts) == 300
    assert model.predict_in_db("text", "rows", primary_id=key).processed == 0


def test_a_shard_goes_with_ids(model: VllmAPI, place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Only rows that are in both the shard and the ids are processed, and no id is missed for that."""
    place.fill_texts(*"abcdefgh")
    asked = [model.predict_in_db("text", "rows", ids=[1, 2, 5], shard=(i, 2)).processed for i in range(2)]
    assert sum(asked) == 3
    assert place.answers().keys() == {1, 2, 5}
    assert "not in the source" not in caplog.text
    model.predict_in_db("text", "rows", ids=[1, 99])
    assert "1 of 2 ids are not in the source" in caplog.text


def test_ids_that_no_shard_has_are_told_once(
    model: VllmAPI, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """By the first shard, whether or not it has any of the others."""
    place.fill_texts(*"abcdefgh")
    for i in range(3):
        model.predict_in_db("text", "rows", ids=[1, 2, 5, 98, 99], shard=(i, 3))
    assert [r.message for r in caplog.records if "ids" in r.message] == ["2 of 5 ids are not in the source"]


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0,), "ab", 1, (0.0, 2), (True, 2)])
def test_what_is_no_shard_is_refused(shard: Any, tmp_path: Any) -> None:
    """A shard is (i, n) with 0 <= i < n."""
    model = VllmAPI(identifier="m", api_url="http://127.0.0.1:1", model="x")
    with pytest.raises(InvalidCall, match="must be"):
        model.predict_in_db("text", "rows", db=str(tmp_path), shard=shard)


def report_of(**fields: Any) -> Report:
    told: dict[str, Any] = {
        "model": "m", "predict_id": "p", "source": "s", "outputs": "o", "fingerprint": "f", "rows": 10,
        "up_to_date": 4, "processed": 6, "succeeded": 5, "failed": 1, "truncated": 2, "prompt_tokens": 30,
        "completion_tokens": 40, "commits": 3, "seconds": {"total": 5.0, "commit": 1.0},
        "errors": (ErrorKind("refused", 1, ((1,),)),), "worst": (FailedRow((1,), "refused", "no"),),
    }  # fmt: skip
    return Report(**{**told, **fields})


def test_reports_of_shards_are_one_report() -> None:
    """Counts are added up, kinds of errors too; seconds are those of the slowest; unknown stays unknown."""
    other = report_of(
        rows=None,
        failed=2,
        seconds={"total": 7.0, "read": 2.0},
        errors=(ErrorKind("timeout", 2, ((2,), (3,))),),
    )
    report = Report.of_shards([report_of(), other], 9.0, shards=2)
    assert (report.rows, report.up_to_date, report.processed, report.failed) == (None, 8, 12, 3)
    assert report.seconds == {"total": 9.0, "commit": 1.0, "read": 2.0}
    assert [(e.kind, e.rows) for e in report.errors] == [("timeout", 2), ("refused", 1)]
    assert len(report.worst) == 2


def test_the_report_of_shards_has_examples_of_each_kind() -> None:
    """The verdict on a run quotes an error of the most frequent kind, whichever shard met it."""
    first = report_of(failed=60, worst=tuple(FailedRow((i,), "output", "x") for i in range(60)))
    second = report_of(failed=80, worst=tuple(FailedRow((i,), "too_long", "y") for i in range(50)))
    kinds = [row.kind for row in Report.of_shards([first, second], 9.0, shards=2).worst]
    assert (kinds.count("output"), kinds.count("too_long")) == (50, 5)


def test_progress_of_parts_is_one_progress() -> None:
    """The number of rows to process is known when all parts have reported theirs."""
    parts = [Progress(10, 3, 1, 20, 2.0), Progress(5, 5, 0, 30, 1.0)]
    assert Progress.of_parts(parts, complete=True) == Progress(15, 8, 1, 50, 2.0)
    assert Progress.of_parts(parts, complete=False).to_process is None
    assert Progress.of_parts([], complete=False).done == 0


def test_outcomes_travel_as_text() -> None:
    """Reports and errors come back unchanged; one that was retried there is not retried here."""
    report = report_of()
    assert payload.value_of(payload.outcome_of(report)) == report
    said = report_of(worst=(FailedRow((1,), "output", "no number: what the model said"),))
    assert "what the model said" not in payload.outcome_of(said)
    with pytest.raises(TooManyFailed, match="too many") as caught:
        payload.value_of(payload.outcome_of_error(TooManyFailed("too many", report)))
    assert caught.value.report == report
    assert not caught.value.repeatable
    judged = ValidationReport("m", "f", ())
    with pytest.raises(GateFailed) as failed:
        payload.value_of(payload.outcome_of_error(GateFailed("worse", judged)))
    assert failed.value.report == judged
    assert dataclasses.is_dataclass(failed.value.report)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@db/crm",
        "postgresql://db/crm?password=secret",
        "s3://key:secret@bucket/x",
        "s3://token@bucket/x",
    ],
)
def test_urls_with_secrets_do_not_travel(url: str) -> None:
    """A secret does not even appear in the refusal."""
    with pytest.raises(InvalidCall) as caught:
        payload.db_parameter(url)
    assert "secret" not in str(caught.value)
    assert "token" not in str(caught.value)


def test_local_places_travel_as_absolute_paths(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker runs in another folder."""
    monkeypatch.chdir(tmp_path)
    assert payload.db_parameter("data") == {"url": f"{tmp_path}/data"}
    assert payload.db_parameter("sqlite:///file.db") == {"url": f"sqlite:///{tmp_path}/file.db"}
    assert payload.db_parameter("s3://bucket/x") == {"url": "s3://bucket/x"}
    assert payload.db_parameter("postgresql://me@db/crm") == {"url": "postgresql://me@db/crm"}


def test_a_report_says_which_shards_it_does_not_count() -> None:
    """The rows of the source are not known then, and the words and the page say so."""
    report = Report.of_shards([report_of()], 9.0, shards=3, unreported=1)
    assert (report.rows, report.up_to_date, report.processed) == (None, None, 6)
    assert "without the rows of 1 cancelled shards, which did not report" in str(report)
    assert "| cancelled shards whose rows are not counted | 1 |" in markdown_of(report)
    assert "cancelled shards" not in str(report_of()) + markdown_of(report_of())
