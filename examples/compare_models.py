"""Two models on the same rows, compared row by row. Here both are the same model, greedy and sampled.

python -m examples.compare_models
"""

from pathlib import Path

from prefect import flow

from examples.validation import KNOWN
from examples.which_model import make_model, options
from vllm_tasks import Dataset, Metric, Validation, compare, validate

PROMPT = "Answer in one short sentence. {input}"
VALIDATION = Validation(
    datasets=[Dataset(identifier="capitals", raw_data=KNOWN)],
    metrics=[Metric(identifier="contains"), Metric(identifier="output_tokens")],
    key=("question", "answer"),
)


@flow(name="compare-sampling")
def compare_sampling(api_url: str, folder: str) -> None:
    """Validate both, then compare the second with the first, row by row."""
    models = [
        make_model(api_url, identifier="greedy", prompt=PROMPT),
        make_model(
            api_url,
            identifier="sampled",
            prompt=PROMPT,
            predict_kwargs={"temperature": 1.5, "seed": 1, "max_tokens": 40},
        ),
    ]
    reports = [validate(model, VALIDATION, db=folder) for model in models]
    print(compare(models, VALIDATION, reports, db=folder))


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compare_sampling(api_url, str(folder))


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
