"""Answers as typed columns: vLLM is given the structure, and every answer is checked against it.

python -m examples.structured_output
"""

from pathlib import Path

from examples.which_model import make_model, options
from vllm_tasks import Datalayer

REVIEWS = """\
{"id": 1, "text": "The chair arrived on Monday and is very comfortable."}
{"id": 2, "text": "The table is scratched and one leg is missing."}
{"id": 3, "text": "Nice lamp, but it took three weeks."}
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "product": {"type": "string", "maxLength": 20},
        "mood": {"enum": ["good", "bad", "mixed"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["product", "mood", "stars"],
    "additionalProperties": False,
}


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reviews.jsonl").write_text(REVIEWS)
    model = make_model(
        api_url,
        identifier="reviews",
        prompt="Describe this review as JSON with product, mood and stars.\n\n{input}",
        output_schema=SCHEMA,
        predict_kwargs={"temperature": 0, "max_tokens": 80},
    )
    db = Datalayer(url=str(folder))
    print(model.predict_in_db("text", "reviews", db=db, max_failed=None))
    outputs = db.outputs("reviews")
    print({name: str(outputs.schema.field(name).type) for name in ("product", "mood", "stars")})
    for row in sorted(outputs.to_pylist(), key=lambda row: row["id"]):
        print(row["_error"] or {name: row[name] for name in ("id", "product", "mood", "stars")})


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
