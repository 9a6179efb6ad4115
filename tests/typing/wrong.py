"""A user's flow with a mistake on each line that ends in a comment.

mypy refuses a `type: ignore` that ignores nothing, so `make check` finds a mistake that is not seen.
"""

from vllm_tasks import VllmAPI, completions, predict_batches, predict_in_db, validate

model = VllmAPI(identifier="m", api_url="http://host:8000")
predict_batches(model, ["a"], on_error=3)  # type: ignore[call-overload]
completions(model, ["a"], on_error="stop")  # type: ignore[call-overload]
predict_in_db(model, "text", "tickets", overwrite="yes")  # type: ignore[call-overload]
predict_in_db(model, "text")  # type: ignore[call-overload]
validate(model, reuze=True)  # type: ignore[call-overload]
model.predict_in_db("text", "tickets", refresh="all")  # type: ignore[arg-type]
model.validate(reuze=True)  # type: ignore[call-arg]
VllmAPI(identifier="m", api_url=3)  # type: ignore[arg-type]
