"""A correct user's flow: no checker reports an error, and each knows the result types."""

from collections.abc import Sequence
from typing import assert_type

from vllm_tasks import (
    RowError,
    VllmAPI,
    compare,
    estimate,
    predict_batches,
    predict_in_db,
    preview,
    validate,
)
from vllm_tasks.results import Comparison, Completion, Estimate, Preview, Report, ValidationReport
from vllm_tasks.tasks import completions

model = VllmAPI(identifier="m", api_url="http://host:8000")
assert_type(predict_in_db(model, "text", "tickets", refresh="changed", max_tokens=5), Report)
assert_type(predict_in_db.submit(model, "text", "tickets").result(), Report)
assert_type(preview(model, "text", "tickets", 3, temperature=0), Preview)
assert_type(estimate(model, "text", "tickets", sample=16, prices={"per_hour": 2.5}), Estimate)
assert_type(validate(model, reuse=True), ValidationReport)
assert_type(completions(model, ["a"], on_error="return", temperature=0), list[Completion | RowError])
assert_type(model.predict_in_db("text", "tickets", limit=5), Report)
assert_type(model.validate(max_failed=0.1), ValidationReport)
answers: Sequence[object] = predict_batches(model, ["a"], on_error="return", temperature=0)


def side_by_side(models: list[VllmAPI], reports: list[ValidationReport]) -> None:
    validation = models[0].validation
    assert validation is not None
    assert_type(compare(models, validation, reports), Comparison)
