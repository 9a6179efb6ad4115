"""Validations of classes: text metrics take the label, others the probabilities, shown as reliability."""

from __future__ import annotations

import pytest

from tests.lettered import by_words, lettered
from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from tests.validation.exam import Make
from vllm_tasks import Classes, Dataset, InvalidCall, Metric, Validation
from vllm_tasks.placement import payload
from vllm_tasks.validation.pages import markdown_of

METRICS = ["exact_match", "accuracy", "macro_f1", "brier", "expected_calibration_error"]
SURE = {"sure": (0.9, 0.1), "less": (0.6, 0.4), "wrong": (0.9, 0.1)}
ROWS = [("sure 1", "bug"), ("sure 2", "bug"), ("less", "Bug"), ("wrong", "feature")]


def validation(*metrics: str) -> Validation:
    return Validation(
        datasets=[Dataset(identifier="d", select="rows")],
        metrics=[Metric(identifier=name) for name in metrics],
        key=("text", "id"),
    )


def test_metrics_of_labels_and_of_probabilities(place: Place, server: ScriptedServer, make: Make) -> None:
    """In every store: three of four labels are right, and the page compares this with their probability."""
    server.script = lettered(by_words(SURE))
    place.fill_texts(*(text for text, _ in ROWS))
    cases = " UNION ALL ".join(
        f"SELECT {i} AS id, '{t}' AS text, '{y}' AS y" for i, (t, y) in enumerate(ROWS)
    )
    model = make(place, datatype=Classes(["bug", "feature"], review_below=0.8))
    asked = validation(*METRICS)
    asked = asked.model_copy(
        update={
            "datasets": [Dataset(identifier="d", select=f"SELECT * FROM ({cases}) AS c")],
            "key": ("text", "y"),
        }
    )
    report = model.validate(asked)
    (found,) = report.datasets
    values = {value.metric: value.value for value in found.values}
    assert found.truncated == 0
    assert values["exact_match"] == 0.5
    assert values["accuracy"] == 0.75
    assert values["brier"] == pytest.approx((0.1**2 * 2 + 0.4**2 + 0.9**2) / 4)
    # Three rows at 0.9, of which two are right; one at 0.6, which is.
    assert values["expected_calibration_error"] == pytest.approx(3 / 4 * (0.9 - 2 / 3) + 1 / 4 * 0.4)
    page = markdown_of("m", found)
    assert "## Confusion in macro\\_f1" in page or "## Confusion in macro_f1" in page
    assert "| 0.5 to 0.6 | 1 | 0.600 | ██████ | 1.000 | ██████████ |" in page
    assert "| 0.8 to 0.9 | 3 | 0.900 | █████████ | 0.667 | ██████▋ |" in page
    assert [row.answer for row in found.worst if row.metric == "accuracy"] == ["bug"]
    again = payload.value_of(payload.outcome_of(report))
    assert again.datasets[0].tables == found.tables


def test_probabilities_are_needed(here: Place, server: ScriptedServer, make: Make) -> None:
    """A model without classes is refused by name, before any row is sent."""
    here.fill_texts("a")
    for name in ("brier", "expected_calibration_error"):
        with pytest.raises(InvalidCall, match=f"'{name}' needs the probabilities.*datatype=Classes"):
            make(here).validate(validation("exact_match", name))
    assert not server.posts


def test_a_list_of_classes_is_refused(here: Place, server: ScriptedServer, make: Make) -> None:
    """A row has one class; others are known before any row is sent."""
    rows = Dataset(identifier="d", raw_data=[{"text": "a", "id": ["bug"]}])
    asked = validation("brier").model_copy(update={"datasets": [rows]})
    with pytest.raises(InvalidCall, match="'brier', on row 0: brier takes one class as target"):
        make(here, datatype=Classes(["bug", "feature"])).validate(asked)
    assert not server.posts


def test_probabilities_without_names_are_refused(here: Place, server: ScriptedServer, make: Make) -> None:
    """A model of `task="classify"` returns them in an order that no server tells."""
    here.fill_texts("a")
    for name in ("brier", "expected_calibration_error"):
        with pytest.raises(InvalidCall, match=f"'{name}' needs the probabilities of classes by name"):
            make(here, task="classify").validate(validation(name))
    assert not server.posts
