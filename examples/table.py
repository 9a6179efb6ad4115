"""A CSV file in, a Delta table out: one output or one error per row, and no row is sent twice.

python -m examples.table
"""

from pathlib import Path

from examples.which_model import make_model, options
from vllm_tasks import Datalayer

TICKETS = """\
id,title,body
007,The printer is on fire,Smoke comes out of the printer on the second floor.
008,Cannot log in,My password is refused since this morning.
009,A line with,too many,cells,in it
010,Where is my order?,I ordered two chairs in May and got one table.
"""


def main(api_url: str = "", folder: Path = Path("out/examples")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tickets.csv").write_text(TICKETS)
    model = make_model(
        api_url,
        identifier="tickets",
        signature="**kwargs",
        prompt="Summarize this ticket in one short sentence.\n\n{title}\n{body}",
    )
    db = Datalayer(url=str(folder))
    first = model.predict_in_db(["title", "body"], "tickets", db=db, max_failed=1)  # one row may fail
    print(f"first run: {first.succeeded} outputs, {first.failed} errors")
    second = model.predict_in_db(["title", "body"], "tickets", db=db)
    print(f"second run: {second.up_to_date} of {second.rows} rows were up to date, none was sent\n")
    for row in sorted(db.outputs("tickets").to_pylist(), key=lambda row: row["id"]):
        print(row["id"], "->", " ".join((row["output"] or row["_error"]).split()))


if __name__ == "__main__":
    main(options(__doc__).parse_args().api_url)
