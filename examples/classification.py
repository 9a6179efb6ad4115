"""Classes with a probability: a table of labels, and the rows that a person should look at.

python -m examples.classification
"""

from pathlib import Path

from examples.which_model import make_model, options
from vllm_tasks import Classes, Datalayer

TICKETS = """\
{"id": 1, "text": "The app crashes when I open the settings."}
{"id": 2, "text": "Please add a dark mode."}
{"id": 3, "text": "How do I change my password?"}
{"id": 4, "text": "It is slow, could you make it faster?"}
"""
KINDS = Classes(
    {
        "bug": "something is broken",
        "feature": "a wish for something new",
        "question": "somebody wants to know something",
    },
    review_below=0.8,
)


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tickets.jsonl").write_text(TICKETS)
    model = make_model(
        api_url,
        identifier="kinds",
        prompt="What kind of ticket is this?\n\n{input}",
        datatype=KINDS,
        predict_kwargs={},
    )
    db = Datalayer(url=str(folder))
    print(model.predict_in_db("text", "tickets", db=db))
    for row in db.outputs("kinds").sort_by("id").to_pylist():
        review = "  <- for a person" if row["_review"] else ""
        print(row["_error"] or f"{row['id']} {row['label']} {row['probability']:.2f}{review}")


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
