"""A flow that processes new rows of a table: run it once, or serve it on a schedule.

python -m examples.scheduled_flow
python -m examples.scheduled_flow --serve      # needs a Prefect server: `prefect server start`
"""

from pathlib import Path

from prefect import flow

from examples.which_model import make_model, options
from vllm_tasks import predict_in_db

CRON = "0 2 * * *"


@flow(name="nightly-answers", log_prints=False)
def nightly(api_url: str = "", folder: str = "out/examples") -> int:
    """Answer the questions that have no answer yet, and return their number."""
    model = make_model(api_url, identifier="nightly", prompt="Answer in one short sentence. {input}")
    report = predict_in_db(model, "question", "nightly", db=folder)
    print(report)
    return int(report.processed)


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "nightly.jsonl"
    table.write_text('{"id": 1, "question": "What is the capital of France?"}\n')
    print("first night:", nightly(api_url, str(folder)), "row processed")
    with table.open("a") as rows:
        rows.write('{"id": 2, "question": "What colour is a ruby?"}\n')
    print("second night:", nightly(api_url, str(folder)), "row processed")
    print(f"with --serve it runs on the schedule {CRON}, as the deployment nightly-answers/nightly")


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--serve", action="store_true", help="stay and run the flow on its schedule")
    given = parser.parse_args()
    if given.serve:
        nightly.serve(name="nightly", cron=CRON, parameters={"api_url": given.api_url})
    else:
        main(given.api_url)
