"""Attacks that other files do not test: remote code, sizes, markup, names.

Places are attacked in test_places, templates in calls/test_templates, SELECTs and paths in
datalayer/lake/test_reading and datalayer/database/test_refusals, dotted paths in models/test_callables, keys,
certificates and redirects in engines/http/test_connections.
"""

from __future__ import annotations

import ast
import logging
import re
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import Reply, ScriptedServer, answer_to, usual
from vllm_tasks import InvalidCall, VllmAPI, VllmModel, serve
from vllm_tasks.artifacts import cell, code, markdown_of, markdown_table, plain_lines, words
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.engines import loop
from vllm_tasks.engines.http.urls import split_urls
from vllm_tasks.engines.local import process
from vllm_tasks.engines.local.engine import LocalEngine
from vllm_tasks.engines.ray.engine import RayConfig
from vllm_tasks.errors import RowErrors
from vllm_tasks.printable import printable
from vllm_tasks.results import Report
from vllm_tasks.rows import RowError
from vllm_tasks.serving.api import command_line
from vllm_tasks.tables import predict_in_db
from vllm_tasks.tables.keys import key_range
from vllm_tasks.tables.report import ErrorKind

PACKAGE = Path(__file__).parents[1] / "vllm_tasks"


# ---------------------------------------------------------------------- whose code runs


def local(**fields: Any) -> VllmModel:
    return VllmModel(identifier="m", model_name="org/m", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"trust_remote_code": False, "vllm_kwargs": {"trust_remote_code": True}},
        {"trust_remote_code": False, "vllm_kwargs": {"trust-remote-code": 1}},
        {"trust_remote_code": False, "vllm_kwargs": {"trust_remote_co": True}},
        {"on_ray": True},
    ],
)
def test_a_site_can_forbid_the_code_of_models(monkeypatch: pytest.MonkeyPatch, fields: Any) -> None:
    """It is forbidden here, on Ray and on a server of its own; the error says how the model may run."""
    monkeypatch.setenv("VLLM_TASKS_TRUST_REMOTE_CODE", "false")
    model = local(**fields)
    uses: list[Callable[[], Any]] = [lambda: model.predict("x"), model.init]
    if not model.on_ray:
        uses.append(lambda: serve(model).__enter__())
    for use in uses:
        with pytest.raises(InvalidCall, match=r"TRUST_REMOTE_CODE=false.*trust_remote_code=False"):
            use()
    assert '"trust_remote_code": false' in local(trust_remote_code=False)._arguments()


def test_an_item_of_a_list_is_no_option_of_a_server() -> None:
    """Otherwise a list among the engine arguments could set a forbidden or reserved option."""
    for word in ("--trust-remote-code", "--host=0.0.0.0", "-tp"):
        with pytest.raises(InvalidCall, match=f"{word}.*option"):
            command_line({"served_model_name": ["m", word]})
    assert command_line({"sizes": [-1, "a-b"]}) == ["--sizes", "-1", "a-b"]


def test_trust_is_said_once_for_each_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The log names the model whose code may run, and nothing where it may not; a restart logs no more."""
    monkeypatch.setattr(process, "HOST", Path(__file__).parent / "servers/scripted_host.py")
    caplog.set_level(logging.INFO)
    for trusted in (True, False):
        arguments = {"log": str(tmp_path / f"{trusted}.log")}
        with local(trust_remote_code=trusted, vllm_kwargs=arguments, compute_kwargs={"num_gpus": 0}) as model:
            assert model.predict_batches(["die", "x"]) == ["die", "x"]
    assert sum("trust_remote_code=True" in message for message in caplog.messages) == 1


def test_the_sites_key_goes_to_the_sites_servers_only(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that names another server gets no key of the site's; one with a key of its own sends that."""
    monkeypatch.setenv("VLLM_TASKS_API_URL", f"{server.url}/v1")
    monkeypatch.setenv("VLLM_TASKS_API_KEY", "of-the-site")

    def key_at(url: Any, **fields: Any) -> str | None:
        return VllmAPI(identifier="m", api_url=url, **fields).engine_config().credentials.api_key

    assert key_at("") == key_at(server.url) == "of-the-site"
    assert [str(endpoint) for endpoint in split_urls(server.url)[0]] == [server.url]
    port = server.url.rpartition(":")[2]
    for other in (
        f"https://127.0.0.1:{port}",
        f"http://evil:{port}",
        "http://127.0.0.1:1",
        [server.url, "http://e"],
    ):
        assert key_at(other) is None
    assert key_at("http://evil", api_key="own") == "own"
    monkeypatch.delenv("VLLM_TASKS_API_URL")
    assert key_at("http://any") == "of-the-site"


UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}


EVALUATORS = {"eval", "exec", "FunctionType", "__import__", "os.system", "os.popen", "subprocess.getoutput"}
"""`compile` is not one: it runs nothing, and its code is compared with that of functions."""


def test_nothing_is_evaluated_or_unpickled() -> None:
    """No module imports a pickler, evaluates text or calls a shell; YAML is read in its safe form.

    There are two pickles, made by Ray and Prefect themselves between processes of one run: the class of the
    actor, and the argument of a task, for which `copyreg.pickle` is registered.
    """
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            shell = isinstance(node, ast.Call) and any(k.arg == "shell" for k in node.keywords)
            unsafe = called.startswith("yaml.") and called != "yaml.safe_load"
            unsafe = unsafe or (called == "YAML" and "typ='safe'" not in ast.unparse(node))
            if (
                called in EVALUATORS
                or shell
                or unsafe
                or UNPICKLERS & {name.partition(".")[0] for name in names}
            ):
                found.append(f"{file.name}:{node.lineno}")  # type: ignore[attr-defined]  # those have lines
    assert found == []


def test_no_file_is_written_as_csv() -> None:
    """A spreadsheet would take an answer that begins with = for a formula. Tables, batch files and results
    are Delta, SQL and JSON lines.
    """
    written = re.compile(
        r"\bcsv\.(writer|DictWriter|write_csv)|\.(to|write|sink)_csv\(|FORMAT\s+CSV", re.IGNORECASE
    )
    assert written.search("frame.to_csv(file)")
    assert written.search("COPY t TO 'f' (FORMAT CSV)")
    assert [file.name for file in PACKAGE.rglob("*.py") if written.search(file.read_text())] == []


# ---------------------------------------------------------------------- sizes


def test_a_response_that_unpacks_to_more_than_allowed_is_not_unpacked(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 MiB in 200 KB: rows and control calls stop at their limits, and never hold it completely."""
    monkeypatch.setenv("VLLM_TASKS_MAX_RESPONSE_BYTES", "1048576")
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(b" " * 2**20) for _ in range(200)) + packer.flush()
    packed = Reply(bomb, headers={"Content-Encoding": "gzip"})
    for model, path in (("m", "/v1/completions"), (None, "/v1/models")):
        server.script = lambda asked, path=path: packed if asked.path == path else None  # type: ignore[misc]
        tracemalloc.start()
        with pytest.raises((RowErrors, InvalidCall), match=r"larger than 1048576|does not report its model"):
            VllmAPI(identifier="m", api_url=server.url, model=model, retries=0).predict("x")
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
        tracemalloc.stop()


def test_a_prompt_larger_than_allowed_fails_its_row(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not sent; the limit counts bytes, of texts and chat messages alike."""
    monkeypatch.setenv("VLLM_TASKS_MAX_PROMPT_BYTES", "1024")
    for chat in (False, True):
        with VllmAPI(identifier="m", api_url=server.url, model="m", chat=chat) as model:
            fits, long, wide = model.predict_batches(["x" * 900, "x" * 1025, "é" * 600], on_error="return")
        assert fits == answer_to("x" * 900)
        for failed in (long, wide):
            assert isinstance(failed, RowError)
            assert failed.kind == "prompt"
            assert "1,024 are allowed (VLLM_TASKS_MAX_PROMPT_BYTES)" in failed.message
    assert len(server.posts) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"usage": {"prompt_tokens": 2**70}},
        {"usage": {"completion_tokens": -1}},
        {"model": "a\0b"},
        {"choices": [{"index": 0, "text": "x", "finish_reason": "\0"}]},
    ],
)
def test_what_a_server_says_beside_an_answer_ends_no_run(
    place: Place, server: ScriptedServer, change: dict[str, Any]
) -> None:
    """A count or a name that no table could hold is the error of its row, and the others are committed."""
    place.fill_texts("good", "bad")

    def script(asked: Any) -> Reply | None:
        return Reply({**usual(asked).body, **change}) if asked.prompt == "bad" else None

    server.script = script
    with VllmAPI(identifier="m", api_url=server.url, model="m", retries=0) as model:
        report = predict_in_db(model, "text", "rows", db=place.db, max_failed=None)
    assert (report.succeeded, report.failed) == (1, 1)
    good, bad = place.outputs()
    assert good["output"] == answer_to("good")
    assert bad["_error"].startswith("response: expected")


# ---------------------------------------------------------------------- markup and terminals


MARKUP = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](data:image/svg+xml;base64,AAAA)",
    "![x](http://evil/pixel)",
    "[click](javascript:alert(1))",
    "` <b>out of the span</b> `",
    "`` <b>x</b> ``",
    "a | b\n\n# heading\n\n<b>x</b>",
    "&lt;b&gt; &#60;b>",
    "\\<b>x</b>",
    "\\[x\\](http://evil)",
    "</code><b>x</b>",
]


@pytest.mark.parametrize("text", MARKUP)
def test_texts_of_others_are_no_markup(text: str) -> None:
    """Texts of rows, models and servers are rendered as they are, inside and outside of code spans."""
    markdown_it = pytest.importorskip("markdown_it")
    render = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render
    for page in (
        f"# {words(text)}",
        f"Said: {words(text)}",
        markdown_table(("a", "b"), [(words(text), code(text))]),
        f"Model `{cell(text)}`.",
    ):
        html = render(page)
        assert not [tag for tag in ("<script", "<img", "<b>", "<a ", "<h1>h") if tag in html], html


@pytest.mark.parametrize(
    "text", ["http://evil/x", "see WWW.evil.test", "me@evil.test", "mailto:evil", "ftp://e"]
)
def test_a_bare_address_is_no_link(text: str) -> None:
    """Markdown of GitHub's flavour, as the Prefect UI reads it, makes links of them outside of code spans."""
    assert words(text) == f"`{text}`"
    assert words("vllm 0.32") == "vllm 0.32"


@pytest.mark.parametrize(
    "text", [*MARKUP, "[a\n](http://evil)", "```\n<b>x</b>\n```", "[a]: http://evil\n[a]"]
)
def test_texts_in_tables_and_descriptions_are_no_markup(text: str) -> None:
    """The Prefect UI reads cells of tables and descriptions as Markdown: a picture would be loaded."""
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(plain_lines(text))
    assert not [tag for tag in ("<script", "<img", "<b>", "<a ", "<h1>h") if tag in html], html


def test_plain_texts_in_tables_stay_as_they_are() -> None:
    """Numbers, keys, names and lines."""
    for text in ("-0.5", "(7, 'a_b')", "exact_match", "one\ntwo, three.", "100 %"):
        assert plain_lines(text) == text


def test_a_report_shows_what_a_server_says_as_text() -> None:
    """Facts of a server, keys of an error kind and a location are no markup on the page."""
    markdown_it = pytest.importorskip("markdown_it")
    hostile = "".join(MARKUP).replace("\n", " ")
    counts = dict.fromkeys(
        ("processed", "succeeded", "failed", "truncated", "prompt_tokens", "completion_tokens", "commits"), 1
    )
    report = Report(
        model=hostile,
        predict_id=hostile,
        source="t",
        outputs=f"http://x/> {hostile}",
        fingerprint="f",
        rows=1,
        up_to_date=0,
        **counts,
        seconds={"total": 1.0},
        errors=(ErrorKind("output", 1, ((hostile,),)),),
        served_by={"version": hostile},
    )
    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown_of(report))
    assert not [tag for tag in ("<script", "<img", "<b>", "<a ") if tag in page]


ESCAPES = (
    "a\u200f\u061c\u200b\ufeff\U000e0041\x1b[31m\x1b]0;title\x07\nFAKE LOG LINE\r\x9b2J\u202egnp.exe\ud800"
)


def test_nothing_in_a_name_or_an_error_moves_a_terminal() -> None:
    """Keys of a table and messages of servers reach logs and task run names without control characters."""
    (shown,) = (key_range([(ESCAPES,), (ESCAPES,)]),)
    told = str(RowErrors([RowError("server", ESCAPES, index=0)], [None]))
    assert shown.startswith("a" + "\ufffd" * 6 + "[31m")
    for text in (shown, told, cell(ESCAPES), printable(ESCAPES)):
        assert all(c.isprintable() for c in text), text
    assert len(key_range([("x" * 10**6,)])) <= 101


def test_what_a_model_said_is_in_no_error(server: ScriptedServer) -> None:
    """A bad answer is in `errors` for the caller, but not in the text for a log."""
    model = VllmAPI(identifier="m", api_url=server.url, model="m", datatype="int")
    with pytest.raises(RowErrors) as raised:
        model.predict("private words")
    model.close()
    assert "private words" not in str(raised.value) + repr(raised.value)
    assert "private words" in raised.value.errors[0].message


# ---------------------------------------------------------------------- names


NAMES = [
    "../x",
    "..",
    "a/b",
    "/etc/x",
    "a\\b",
    "C:x",
    "a\0b",
    "a\nb",
    "a\x1b[31m",
    " a",
    "a.",
    ".",
    "",
    "a%2fb",
    "a`b",
    "a<b>",
    "a\u202eb",
    "a\u200bb",
    "a\ud800b",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_names_no_table(name: str) -> None:
    """Paths, control and invisible characters, and names with a meaning for Windows or a URL are refused."""
    with pytest.raises(InvalidCall, match="predict_id"):
        outputs_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "x'; DROP TABLE rows; --",
        "x') OR (1=1",
        "\u2024\u2024",
        "a\uff0fb",
        "e\u0301",
        "COM1",
        "-rf",
        "{x}",
        "$HOME",
    ],
)
def test_other_names_are_just_names(place: Place, server: ScriptedServer, name: str) -> None:
    """Quotes, SQL, look-alikes and shell commands name the outputs, and nothing else is created."""
    place.fill_texts("a")
    with VllmAPI(identifier="m", api_url=server.url, model="m") as model:
        predict_in_db(model, "text", "rows", db=place.db, predict_id=name)
    assert place.answers(name) == {0: answer_to("a")}
    if "://" not in place.url:
        assert {p.name for p in Path(place.url).iterdir()} == {"rows.parquet", f"_outputs__{name}"}
        assert {p.name for p in Path(place.url).parent.iterdir()} == {"lake"}


def test_a_name_too_long_is_refused() -> None:
    """No file system has longer names, and some databases truncate them."""
    assert outputs_name("é" * 100)
    with pytest.raises(InvalidCall, match="at most 200 bytes"):
        outputs_name("é" * 100 + "x")


def test_an_engine_is_no_secret_carrier() -> None:
    """Configurations and engines show no argument, among which a token may be."""
    model = local(vllm_kwargs={"hf_token": "hf-secret"}, compute_kwargs={"num_gpus": 0})
    config = model.engine_config()
    ray = local(vllm_kwargs={"hf_token": "hf-secret"}, on_ray=True).engine_config()
    assert isinstance(ray, RayConfig)
    shown = f"{model!r} {model} {config!r} {ray!r}"
    assert "hf-secret" not in shown
    assert not isinstance(config, RayConfig)

    async def made() -> str:
        return repr(LocalEngine(config))  # type: ignore[arg-type]  # it is a LocalConfig

    assert "hf-secret" not in loop.run(made())
