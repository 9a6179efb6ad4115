"""Pictures, audio and video of a record: what is sent of them, and what is refused."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.calls.prompting import prompter, refusal
from tests.servers.scripted_server import Reply, ScriptedServer
from vllm_tasks import InvalidCall, Request, VllmAPI, batch_request
from vllm_tasks.calls.media import Kind, Media, without_media
from vllm_tasks.calls.prompts import Prompter, load_artifact
from vllm_tasks.hosts import check_host

PNG = b"\x89PNG\r\n\x1a\n of a cat"
WAV = b"RIFF\x10\x00\x00\x00WAVEfmt "
MP4 = b"\x00\x00\x00\x18ftypmp42"


def with_media(
    prompt: str = "Describe it.", *, most_bytes: int = 1000, most: int = 3, **given: Any
) -> Prompter:
    fields: dict[str, Kind] = given.pop("fields", {"photo": "image"})
    made = {"chat": True, "signature": "**kwargs", **given}
    return prompter(prompt, media=Media(fields, most_bytes, most), **made)


def url_of(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def part_of(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(content, kind)}}


TEXT = {"type": "text", "text": "Describe it."}


@pytest.mark.parametrize(
    "form", ["bytes", "memoryview", "path", "Path", "uri", "data", "datasets", "inner path"]
)
def test_a_picture_in_any_form_is_sent_as_its_bytes(tmp_path: Path, form: str) -> None:
    """It stands before the text, with the type that its first bytes say."""
    file = tmp_path / "cat.txt"
    file.write_bytes(PNG)
    value = {
        "bytes": PNG,
        "memoryview": memoryview(PNG),
        "path": str(file),
        "Path": file,
        "uri": f"file://{file}",
        "data": url_of(PNG, "image/gif"),
        "datasets": {"bytes": PNG, "path": "cat.png"},
        "inner path": {"bytes": None, "path": str(file)},
    }[form]
    assert with_media()({"photo": value}) == [{"role": "user", "content": [part_of(PNG), TEXT]}]


@pytest.mark.parametrize(
    ("begins", "kind"),
    [
        (b"\xff\xd8\xff\xe0 of a cat", "image/jpeg"),
        (b"RIFF\x01\x02\x03\nWEBPVP8 ", "image/webp"),
        (b"GIF89a", "image/gif"),
    ],
)
def test_the_first_bytes_say_what_a_picture_is(begins: bytes, kind: str) -> None:
    """No library for pictures is needed."""
    (message,) = with_media()({"photo": begins})
    assert message["content"][0] == part_of(begins, kind)


def test_lists_audio_and_video() -> None:
    """A list is sent in its order; an empty one sends the text alone; kinds in the order of the fields."""
    fields = {"photo": "image", "call": "audio", "film": "video"}
    (message,) = with_media(fields=fields)({"photo": [PNG, PNG + b"2"], "call": WAV, "film": []})
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}}
    assert message["content"] == [part_of(PNG), part_of(PNG + b"2"), audio, TEXT]
    (message,) = with_media(fields=fields)({"photo": [], "call": [], "film": MP4})
    film = {"type": "video_url", "video_url": {"url": url_of(MP4, "video/mp4")}}
    assert message["content"] == [film, TEXT]
    assert with_media()({"photo": []}) == [{"role": "user", "content": "Describe it."}]


def test_they_go_into_the_last_user_message() -> None:
    """Of messages from a prompt function, which gets the record; a system message stays in front."""

    def ask(photo: bytes, name: str) -> Request:
        said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        return Request([*said, {"role": "user", "content": [{"type": "text", "text": name}]}], {"seed": 1})

    made = with_media("{input}", prompt_func=ask, system="Be brief")({"photo": PNG, "name": "Tom"})
    assert isinstance(made, Request)
    assert made.sampling == {"seed": 1}
    *before, last = made.prompt
    assert [message["role"] for message in before] == ["system", "user", "assistant"]
    assert last["content"] == [part_of(PNG), {"type": "text", "text": "Tom"}]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"photo": b"%PDF-1.7 of a cat"}, "is not in a known image format (png, jpeg, webp, gif)"),
        ({"photo": b""}, "is not in a known image format"),
        ({"photo": WAV}, "is not in a known image format"),
        ({"photo": PNG + bytes(1000)}, "which are allowed (VLLM_TASKS_MAX_MEDIA_BYTES)"),
        ({"photo": [PNG + bytes(500)] * 2}, "more than 1,000 bytes"),
        ({"photo": url_of(PNG + bytes(1000))}, "more than 1,000 bytes"),
        ({"photo": [PNG] * 4}, "and 3 are allowed (VLLM_TASKS_MAX_MEDIA_PER_ROW)"),
        ({"photo": None}, "is None, not bytes, a path, a URI or a data: URL"),
        ({"photo": 7}, "is a int, not bytes"),
        ({"photo": "/no/such/cat.png"}, "cannot be read: FileNotFoundError"),
        ({"photo": "no://user:password@host/cat.png?key=SECRET"}, "'no://host/cat.png?...' cannot be read"),
        ({"photo": "data:image/png;base64,@@"}, "is a data: URL whose base64 is wrong"),
        ({"photo": "data:image/png,cat"}, "is a data: URL without base64"),
        ({"name": "Tom"}, "the record has no 'photo'; it has ['name']"),
    ],
)  # fmt: skip
def test_what_cannot_be_sent_is_an_error_of_its_row(record: Any, said: str) -> None:
    """It names the value, the limit and the way out, and no secret."""
    message = refusal(with_media()(record))
    assert said in message
    assert "SECRET" not in message
    assert "password" not in message


def test_prompts_without_a_place_for_media() -> None:
    """Token ids, and messages of which none is the user's."""
    for made, said in [([1, 2], "the prompt is token ids"), ([{"role": "tool", "content": ""}], "has none")]:
        asked = with_media("{input}", prompt_func=lambda photo, made=made: made)
        assert said in refusal(asked({"photo": PNG}))


def test_a_large_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    """A sparse file of 1 TB is refused as soon as the limit is passed."""
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(PNG)
        file.truncate(2**40)
    assert "more than 1,000 bytes" in refusal(with_media()({"photo": str(tmp_path / "huge.png")}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": "photo"}, "with signature='singleton' a record is one value: use signature='**kwargs'"),
        ({"images": "photo", "signature": "*args"}, "fields are named by their positions"),
        ({"images": "photo", "audio": "photo", "signature": "**kwargs"}, "audio='photo' is image already"),
        ({"images": "input"}, "write a prompt without {input}"),
        ({"images": "photo", "signature": "**kwargs", "prompt": "Look at {photo}"}, "without {photo}"),
        ({"images": "photo", "signature": "**kwargs", "prompt": "Look", "chat": False}, "chat=False"),
        ({"images": "input", "prompt": "Look", "task": "embed"}, "images is part of a chat message"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], said: str) -> None:
    """When the model is made."""
    with pytest.raises(ValidationError) as refused:
        VllmAPI(identifier="m", api_url="http://localhost", **fields)
    assert said in str(refused.value)


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_path_that_takes_texts_is_refused(server: ScriptedServer, path: str) -> None:
    """Before any row is sent."""
    model = VllmAPI(identifier="m", api_url=server.url + path, images="input", prompt="Look")
    with pytest.raises(InvalidCall, match=r"'input'.* are parts of chat messages, and the path of api_url"):
        model.predict(PNG)
    assert not server.posts


def test_a_record_may_be_the_picture_itself(server: ScriptedServer) -> None:
    """Or a list of pictures. They are chat without asking the server for a template."""
    with VllmAPI(identifier="m", api_url=server.url, images="input", prompt="Describe it.") as model:
        model.predict(PNG)
        model.predict([url_of(PNG), url_of(PNG)])
        model.predict_batches([PNG])
    first, second, third = (asked.body["messages"] for asked in server.posts)
    assert first == third == [{"role": "user", "content": [part_of(PNG), TEXT]}]
    assert second == [{"role": "user", "content": [part_of(PNG), part_of(PNG), TEXT]}]


def test_columns_that_are_media_need_not_be_in_the_template() -> None:
    """One that X does not give is refused."""
    make = with_media("Who is {name}?")
    make.check_fields({"name": "n", "photo": "p"})
    with pytest.raises(InvalidCall, match=r"names \['photo'\] as pictures, audio or video, and X does not"):
        make.check_fields({"name": "n"})
    with pytest.raises(InvalidCall, match="never uses the columns 'o' of X"):
        make.check_fields({"name": "n", "photo": "p", "other": "o"})


def test_the_names_count_in_the_fingerprint_and_none_change_nothing() -> None:
    """A prompt without media has the identity that it always had."""
    assert "media" not in prompter().identity()
    assert with_media().identity()["media"] == {"photo": "image"}


def test_people_see_sizes_in_place_of_bytes() -> None:
    """In previews and in kept prompts."""
    made = with_media(fields={"photo": "image", "call": "audio"})({"photo": PNG, "call": WAV})
    shown = json.dumps(without_media(made))
    assert f'"data:image/png;base64,... ({len(PNG)} bytes)"' in shown
    assert f'"data": "... ({len(WAV)} bytes)"' in shown
    for text in ("data:image/png;base64,AAAA", [{"role": "user", "content": "data:image/png;base64,AAAA"}]):
        assert without_media(text) == text


class TestPlaces:
    """Rows are data of others: they must not lead out of what a site allows."""

    @pytest.fixture
    def pictures(self) -> Any:
        with ScriptedServer() as there:
            there.script = lambda asked: (
                Reply(status=302, headers={"Location": "/cat.png"}) if "moved" in asked.path else Reply(PNG)
            )
            yield there

    def test_without_places_the_web_is_read(self, pictures: ScriptedServer) -> None:
        assert with_media()({"photo": f"{pictures.url}/cat.png"})[0]["content"][0] == part_of(PNG)

    def test_this_machine_and_its_link_are_never_asked(
        self, pictures: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not even where the place names them; nothing has reached the server."""
        metadata = "http://169.254.169.254"
        monkeypatch.setenv("VLLM_TASKS_PLACES", json.dumps([pictures.url, metadata]))
        for url in (pictures.url, metadata):
            assert "a loopback, link-local or private address" in refusal(
                with_media()({"photo": f"{url}/cat.png"})
            )
        assert "outside the places" in refusal(with_media()({"photo": "http://example.org/cat.png"}))
        assert not pictures.requests

    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "127.1",
            "2130706433",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "0.0.0.0",
            "[fe80::1]",
            "",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "0177.0.0.1",
            "①②⑦.⓪.⓪.①",
            "a@127.0.0.1",
        ],
    )
    def test_every_spelling_of_an_own_address(self, host: str) -> None:
        with pytest.raises(InvalidCall, match=r"loopback, link-local|is not known"):
            check_host("photo", f"http://{host}/cat.png")

    def test_a_redirect_is_not_followed(
        self, pictures: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may lead out of the places. (The host's address is given another one.)"""
        monkeypatch.setenv("VLLM_TASKS_PLACES", json.dumps([f"{pictures.url}/allowed"]))
        elsewhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.1", 0))]
        monkeypatch.setattr("vllm_tasks.hosts.socket.getaddrinfo", lambda *_: elsewhere)
        assert with_media()({"photo": f"{pictures.url}/allowed/cat.png"})[0]["content"][0] == part_of(PNG)
        assert isinstance(refusal(with_media()({"photo": f"{pictures.url}/allowed/moved"})), str)
        assert load_artifact(f"{pictures.url}/allowed/cat.txt", "bytes") == PNG
        with pytest.raises(InvalidCall, match=r"allowed/moved' cannot be read"):
            load_artifact(f"{pictures.url}/allowed/moved", "bytes")
        assert not any(asked.path == "/cat.png" for asked in pictures.requests)

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
            {"type": "image_url", "image_url": {"url": "https://host/cat.png"}},
            {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
            {"type": "text", "text": "x", "uuid": "1", "image_url": "HTTP://127.0.0.1/"},
            {"audio_url": " data:audio/wav;base64,AAAA"},
        ],
    )
    def test_messages_name_no_address_for_the_engine(
        self, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Their bytes are sent, or nothing: an engine follows redirects, and reaches other networks."""
        monkeypatch.setenv("VLLM_TASKS_PLACES", '["https://host/"]')
        messages = [{"role": "user", "content": [TEXT, part_of(PNG), part]}]
        for said in (
            refusal(prompter()(messages)),
            refusal(prompter(messages_as_json=True)(json.dumps(messages))),
            refusal(prompter(prompt_func=batch_request)({"messages": messages})),
            refusal(with_media("{input}", prompt_func=lambda photo: messages)({"photo": PNG})),
        ):
            assert "which the engine would open, and this site limits places" in said
        messages[0]["content"].remove(part)
        assert prompter()(messages) == messages

    def test_a_file_outside_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cat.png").write_bytes(PNG)
        monkeypatch.setenv("VLLM_TASKS_PLACES", json.dumps([str(tmp_path / "allowed")]))
        assert "outside the places" in refusal(with_media()({"photo": str(tmp_path / "cat.png")}))
