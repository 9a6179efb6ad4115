"""Vectors of texts in a table, and the text that is nearest to a question.

python -m examples.embeddings
"""

from pathlib import Path

import numpy as np

from examples.which_model import make_model, options
from vllm_tasks import Datalayer

NOTES = """\
{"id": 1, "text": "The chair arrived on Monday and is very comfortable."}
{"id": 2, "text": "The table is scratched and one leg is missing."}
{"id": 3, "text": "Nice lamp, but it took three weeks."}
"""


def main(api_url: str = "", folder: Path = Path("out/examples"), query: str = "Which lamp is nice?") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "notes.jsonl").write_text(NOTES)
    db = Datalayer(url=str(folder))
    model = make_model(api_url, identifier="embedded", task="embed", predict_kwargs={})
    report = model.predict_in_db("text", "notes", db=db)
    again = model.predict_in_db("text", "notes", db=db)
    notes = db.outputs("embedded", source="notes")
    vectors = np.array(notes["output"].to_pylist(), dtype=np.float32)
    nearest = int(np.argmax(vectors @ np.array(model.predict(query))))
    print(f"{report.succeeded} vectors of {vectors.shape[1]} numbers; again: {again.processed} sent")
    print(f"{query} -> {notes['text'][nearest]}")


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
