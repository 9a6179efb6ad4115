"""Copies figures from `benchmarks/` into README.md and the site, and writes `docs/llms.txt`.

`make docs-figures` runs it. It writes everything between `<!-- figures: NAME -->` and `<!-- end -->` in a
page; no figure there is written by hand. tests/test_docs.py fails if a page differs from its output.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from benchmarks.results import below, cells_of, read, table
from docs.metric_examples import examples
from vllm_tasks import Metric

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "performance.md", DOCS / "reference" / "metrics.md")
MARKED = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "`predict_in_db`"
Rows = dict[str, dict[str, str]]


def main() -> None:
    for page, text in written().items():
        page.write_text(text, encoding="utf-8")


def written() -> dict[Path, str]:
    """The text that each page should have."""
    pages = {page: MARKED.sub(_copied, page.read_text(encoding="utf-8")) for page in PAGES}
    return {**pages, DOCS / "llms.txt": contents()}


def _copied(match: re.Match[str]) -> str:
    name = match[2]
    copied = TABLES[name]() if name in TABLES else part(*name.split(" / "))
    return f"{match[1]}\n{copied.strip()}\n\n{match[3]}"


def part(name: str, *headings: str) -> str:
    """A part of RESULTS.md, or the text below `headings` in it; its own headings go one level down."""
    text = below(read()[name], *headings)
    assert text, f"RESULTS.md has nothing below {name} / {' / '.join(headings)}"
    text = re.sub(r"^!\[.*\]\(.*\)$\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"^##(#+ )", r"#\1", text, flags=re.MULTILINE)


def figures() -> str:
    """FIGURES.md without its title."""
    return (ROOT / "benchmarks" / "FIGURES.md").read_text(encoding="utf-8").partition("\n")[2]


def rows_of(*headings: str) -> Rows:
    """The first table below `headings`, by its first column; names lose their stars."""
    return {next(iter(cells.values())).strip("*"): cells for cells in cells_of(part(*headings))}


def beside() -> str:
    """Six measures of the same work: ours, and those of other tools."""
    with_engines, as_clients = "Peers with an engine each", "Peers as clients of one server"
    engines = rows_of(with_engines, "Short answers")
    repeated = rows_of(with_engines, "Half of the rows repeated")
    clients = rows_of(as_clients, "Short answers")
    bad = rows_of("Peers and rows that differ", "A row that is refused") | rows_of(
        as_clients, "A row that is refused"
    )
    crash = rows_of("Peers after a crash", "A crash at half")
    rate, cpu, again = "tokens/s", "CPU, ms/row", "rows sent again"
    ended = {
        name: str(int(row["rows with an output"]) + int(row["rows with an error"]))
        for name, row in bad.items()
    }
    bare, ray = "LLM.generate", "Ray Data LLM: engine"
    curator, datatrove = "bespokelabs-curator", "datatrove: InferenceRunner"
    harness, bench = "lm-evaluation-harness", "vllm bench serve"
    run = "ours: predict_in_db"

    def line(what: str, mine: str, others: dict[str, str]) -> list[str]:
        return [what, f"**{mine}**", ", ".join(f"{_short(name)} {value}" for name, value in others.items())]

    def tokens(found: Rows, *names: str) -> dict[str, str]:
        return {name: found[name][rate] for name in names}

    return table(
        ("", OURS, "others"),
        [
            line("own engine, tokens/s", engines[run][rate], tokens(engines, bare, "AsyncLLM", ray)),
            line(
                "own engine, half of the rows repeated, tokens/s",
                repeated[run][rate],
                tokens(repeated, bare, ray),
            ),
            line(
                "one server, tokens/s",
                clients[run][rate],
                tokens(clients, bench, curator, datatrove, harness),
            ),
            line(
                "one server, CPU of the client, ms per row",
                clients[run][cpu],
                {name: clients[name][cpu] for name in (datatrove, curator, "Ray Data LLM: HTTP")},
            ),
            line(
                "1 row of 100 is refused: rows with an output or an error",
                ended[run],
                {name: ended[name] for name in (bare, ray, harness, datatrove, curator)},
            ),
            line(
                "killed at half of 400 rows and restarted: rows sent again",
                crash[run][again],
                {name: crash[name][again] for name in ("Ray Data LLM: HTTP", datatrove, curator)},
            ),
        ],
    ).replace("--:", "---")  # fmt: skip


def _short(name: str) -> str:
    return f"`{name}`" if name in ("LLM.generate", "AsyncLLM", "vllm bench serve") else name.partition(":")[0]


def contents() -> str:
    """The pages of the site, each with its question, in the format of https://llmstxt.org."""
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    lines = [f"# {site['site_name']}", "", f"> {site['site_description']}", ""]
    for title, page in pages_of(site["nav"]):
        if page is None:
            lines += ["", f"## {title}", ""]
            continue
        address = page.removesuffix(".md") + ".html"
        question = question_of(DOCS / page)
        lines.append(f"- [{title}]({address})" + (f": {question}" if question else ""))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def pages_of(nav: list[Any]) -> Iterator[tuple[str, str | None]]:
    """(title, page) in the order of the site; a group's title comes first, without a page."""
    for entry in nav:
        ((title, inside),) = entry.items()
        if isinstance(inside, str):
            yield title, inside
        else:
            yield title, None
            yield from pages_of(inside)


def question_of(page: Path) -> str:
    """The first line below a page's title, if it is a question; else an empty text."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 and lines[1].endswith("?") else ""


def built_in() -> tuple[str, ...]:
    """The names of the built-in metrics."""
    return get_args(get_args(Metric.model_fields["object"].annotation)[0])


def score_of(name: str) -> Callable[..., Any]:
    """The function that scores an answer by a built-in metric."""
    needed = {
        "multiple_choice": {"choices": "choices"},
        "judge": {"model": "vllm-api/judge", "rubric": "Short."},
    }
    return Metric(identifier=name, options=needed.get(name, {})).measure().score


def metrics() -> str:
    """The docstring of each built-in metric: formula, range, direction and source."""
    found = {name: inspect.getmodule(score_of(name)) for name in built_in()}
    texts = {name: inspect.getdoc(module) or "" for name, module in found.items()}
    return "\n\n".join(f"**`{name}`**: {_paragraph(text)}" for name, text in texts.items())


def _paragraph(docstring: str) -> str:
    """A docstring as one paragraph, without the metric's name if it adds nothing."""
    name, _, formula = docstring.partition(": ")
    text = re.sub(r"\s+", " ", formula if len(name.split()) <= 2 else docstring)
    return re.sub(r"(?<!<)https://\S+[\w/]", r"<\g<0>>", text)


TABLES: dict[str, Callable[[], str]] = {
    "beside": beside,
    "examples": examples,
    "figures": figures,
    "metrics": metrics,
}

if __name__ == "__main__":
    main()
