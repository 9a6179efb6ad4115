"""A score with a 95 % interval, and a gate: a model that misses its limits fails the flow.

python -m examples.validation
"""

from pathlib import Path

from prefect import flow

from examples.which_model import make_model, options
from vllm_tasks import Dataset, GateFailed, Metric, Validation, validate

KNOWN = [
    {"question": "What is the capital of France?", "answer": "Paris"},
    {"question": "What is the capital of Italy?", "answer": "Rome"},
    {"question": "What is the capital of Spain?", "answer": "Madrid"},
    {"question": "What is the capital of Japan?", "answer": "Tokyo"},
    {"question": "What is the capital of Egypt?", "answer": "Cairo"},
    {"question": "What is the capital of Norway?", "answer": "Oslo"},
    {"question": "What is the capital of Peru?", "answer": "Lima"},
    {"question": "What is the capital of Kenya?", "answer": "Nairobi"},
]


EASY = Validation(
    datasets=[Dataset(identifier="capitals", raw_data=KNOWN)],
    metrics=[Metric(identifier="contains"), Metric(identifier="output_tokens")],
    key=("question", "answer"),
    thresholds={"contains": 0.1},
)
STRICT = EASY.model_copy(update={"thresholds": {"output_tokens": 1}})  # less is better: at most one token


@flow(name="check-capitals")
def check(api_url: str, folder: str) -> None:
    """Score the model twice: against a limit that it meets, and against one that it misses."""
    model = make_model(api_url, identifier="capitals", prompt="Answer in one short sentence. {input}")
    report = validate(model, EASY, db=folder)
    for value in report.datasets[0].values:
        print(f"{value.metric}: {value}")
    print("passed:", report.passed)
    try:
        validate(model, STRICT, db=folder)
    except GateFailed as error:
        print(f"GateFailed: {error}")


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    check(api_url, str(folder))


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
