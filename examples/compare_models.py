"""Two models on the same rows, compared row by row. Here both are one model, with two prompts.

python -m examples.compare_models
"""

from pathlib import Path

from prefect import flow

from examples.validation import KNOWN
from examples.which_model import make_model, options
from vllm_tasks import Dataset, Metric, Validation, compare, validate

VALIDATION = Validation(
    datasets=[Dataset(identifier="capitals", raw_data=KNOWN)],
    metrics=[Metric(identifier="contains"), Metric(identifier="output_tokens")],
    key=("question", "answer"),
)


@flow(name="compare-prompts")
def compare_prompts(api_url: str, folder: str) -> None:
    """Validate both, then compare the second with the first, row by row."""
    models = [
        make_model(api_url, identifier="in-a-sentence", prompt="Answer in one short sentence. {input}"),
        make_model(api_url, identifier="in-a-word", prompt="Answer with one word. {input}"),
    ]
    reports = [validate(model, VALIDATION, db=folder) for model in models]
    print(compare(models, VALIDATION, reports, db=folder))


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compare_prompts(api_url, str(folder))


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
