"""Over HTTP: encrypted connections, and where the key goes."""

from __future__ import annotations

import json
import logging
import socket
import threading
from pathlib import Path

import pytest

from tests.engines.http.deeds import KEY, Make
from tests.servers.scripted_server import Deed, Raw, Reply, ScriptedServer, answer_to, refused
from vllm_tasks import InvalidCall, RowError
from vllm_tasks.errors import RowErrors, ServerUnavailable

pytestmark = pytest.mark.usefixtures("hasty")


# ---------------------------------------------------------------------- encrypted connections


@pytest.mark.parametrize("model", [None, "m"])
def test_rows_and_control_calls_trust_the_authorities_of_ssl_cert_file(
    encrypted: ScriptedServer,
    api: Make,
    monkeypatch: pytest.MonkeyPatch,
    certificate: Path,
    model: str | None,
) -> None:
    """A server with a certificate of its own works when SSL_CERT_FILE names that."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert api(encrypted.url, model=model).predict_batches(["a", "b"]) == [answer_to("a"), answer_to("b")]


@pytest.mark.parametrize("model", [None, "m"])
def test_a_certificate_that_is_not_trusted_is_the_calls_fault(
    encrypted: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    """It raises at once, with the URL, the reason and the way out, and no row is sent."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(InvalidCall, match=rf"{encrypted.url}.*self.signed.*SSL_CERT_FILE"):
        api(encrypted.url, model=model).predict("x")
    assert encrypted.requests == []


@pytest.mark.parametrize("model", [None, "m"])
def test_a_server_that_speaks_no_tls_is_the_calls_fault(
    server: ScriptedServer, api: Make, model: str | None
) -> None:
    """An https URL of an http server is corrected by the caller, not waited for."""
    url = server.url.replace("http:", "https:")
    with pytest.raises(InvalidCall, match=rf"{url}.*correct api_url"):
        api(url, model=model).predict("x")


@pytest.mark.parametrize("model", [None, "m"])
def test_a_server_that_goes_away_in_the_handshake_is_waited_for(
    api: Make, monkeypatch: pytest.MonkeyPatch, model: str | None
) -> None:
    """A connection that ends before it is encrypted does not count as a distrusted certificate."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.2")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(9999)
            except OSError:
                return

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(ServerUnavailable):
            api(f"https://127.0.0.1:{listener.getsockname()[1]}", model=model, retries=9).predict("x")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# ---------------------------------------------------------------------- the key


def test_the_key_is_sent_as_a_bearer_token_and_shown_nowhere(
    server: ScriptedServer, api: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request carries the key; no display of the model or its engine does."""
    caplog.set_level(logging.DEBUG)
    model = api(model=None, api_key=KEY)
    model.predict("x")
    assert [a.headers["Authorization"] for a in server.requests] == [f"Bearer {KEY}"] * 2
    assert KEY not in repr(model) + str(model) + repr(model.engine_config()) + caplog.text


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
@pytest.mark.parametrize(
    "deed",
    [
        refused(401, f"bad key {KEY}"),
        refused(400, f"bad key {KEY}"),
        refused(500, f"bad key {KEY}"),
        Reply({"key": KEY}),
        Reply(KEY.encode()),
        Reply(status=307, headers={"Location": f"http://127.0.0.1:1/{KEY}"}),
        Raw(b"no HTTP at all\r\n\r\n"),
        Raw(f"HTTP/1.1 {KEY}\r\n\r\n".encode()),
        Raw(f"HTTP/1.1 200 OK\r\nX: {KEY}\r\nContent-Length: 9\r\n\r\n{{".encode()),
        Raw(reset=True),
    ],
)
def test_a_server_that_echoes_the_key_does_not_get_it_into_errors(
    server: ScriptedServer,
    api: Make,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    deed: Deed,
) -> None:
    """No error and no log has the key, even if the server puts it into its response."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.1")
    server.script = lambda asked: deed if asked.path == path else None
    model = api(model=None if path == "/v1/models" else "m", api_key=KEY)
    with pytest.raises((InvalidCall, ServerUnavailable, RowErrors)) as raised:
        model.predict("x")
    seen = str(raised.value) + repr(raised.value) + caplog.text
    if isinstance(raised.value, RowErrors):
        seen += repr(raised.value.results)
    assert KEY not in seen


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("key", ["sk-base64/of/it", 'sk-"quoted"', KEY + "0123456789" * 8])
def test_a_key_is_hidden_in_every_form_that_json_has_for_it(
    server: ScriptedServer, api: Make, key: str, status: int
) -> None:
    """The key is hidden when it is escaped, and when it is truncated in the middle because it is long."""
    said = json.dumps({"error": {"message": f"bad key {key}"}, "key": key}).replace("/", r"\/")
    server.script = lambda asked: Reply(said.encode(), status) if asked.body else None
    with pytest.raises((InvalidCall, RowErrors)) as raised:
        api(api_key=key).predict("x")
    assert key[:12] not in str(raised.value)


@pytest.mark.parametrize("key", [f"{KEY}\n", f"{KEY}\r\nX: y", f" {KEY}", f"{KEY}é", f"{KEY}\0"])
def test_a_key_that_no_header_can_carry_is_refused_before_it_is_sent(
    server: ScriptedServer, api: Make, key: str
) -> None:
    """A key with a line end, as read from a file, raises InvalidCall that names api_key and not the key."""
    with pytest.raises(InvalidCall, match="api_key") as raised:
        api(model=None, api_key=key).predict("x")
    assert KEY not in str(raised.value)
    assert server.requests == []


def test_netrc_and_proxies_of_the_environment_do_not_change_where_the_key_goes(
    server: ScriptedServer, api: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows and control calls go straight to the server with our key."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert api(model=None, api_key=KEY).predict("x") == answer_to("x")
    assert {a.headers["Authorization"] for a in server.requests} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(
    server: ScriptedServer, other: ScriptedServer, api: Make, path: str, status: int
) -> None:
    """A redirect is the call's fault, and the other host never hears of us or of the key."""
    moved = Reply(status=status, headers={"Location": other.url + path})
    server.script = lambda asked: moved if asked.path == path else None
    with pytest.raises(InvalidCall, match=f"HTTP {status}"):
        api(model=None, api_key=KEY).predict("x")
    assert other.requests == []


def test_a_redirect_of_one_row_is_the_error_of_that_row(server: ScriptedServer, api: Make) -> None:
    """A gateway that leads one text to a page of its own costs that row only."""
    blocked = Reply(status=302, headers={"Location": "http://127.0.0.1:1/blocked"})
    server.script = lambda asked: blocked if asked.prompt == "b" else None
    a, b, c = api().predict_batches(["a", "b", "c"], on_error="return")
    assert (a, c) == (answer_to("a"), answer_to("c"))
    assert isinstance(b, RowError)
    assert "http://127.0.0.1:1/blocked" in b.message
