"""A user's flow with a mistake on each marked line, which every checker finds."""

from vllm_tasks import VllmAPI, predict_batches, predict_in_db, validate
from vllm_tasks.tasks import completions

model = VllmAPI(identifier="m", api_url="http://host:8000")
predict_batches(model, ["a"], on_error=3)  # wrong
completions(model, ["a"], on_error="stop")  # wrong
predict_in_db(model, "text", "tickets", overwrite="yes")  # wrong
predict_in_db(model, "text")  # wrong
validate(model, reuze=True)  # wrong
model.predict_in_db("text", "tickets", refresh="all")  # wrong
model.validate(reuze=True)  # wrong
VllmAPI(identifier="m", api_url=3)  # wrong
