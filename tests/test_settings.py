"""Settings in the files where those of Prefect and its integrations stand."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cachetools import TTLCache

from tests.eventually import LONG_ENOUGH
from vllm_tasks import InvalidCall
from vllm_tasks.settings import Settings, site_settings

TABLE = "integrations.vllm_tasks"
PROFILES = 'active = "mine"\n[profiles.mine]\nVLLM_TASKS_TIMEOUT = "{}"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with no file yet, and the profiles in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    monkeypatch.delenv("VLLM_TASKS_CALLABLE_PREFIXES")
    return tmp_path


def test_the_environment_comes_first_then_files_then_the_profile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place counts where no earlier one has a value, and at once."""
    assert site_settings().timeout == 600
    (folder / "profiles.toml").write_text(PROFILES.format(1))
    assert site_settings().timeout == 1
    (folder / "pyproject.toml").write_text("[tool.prefect.integrations.vllm_tasks]\ntimeout = 2\n")
    assert site_settings().timeout == 2
    (folder / "prefect.toml").write_text("[integrations.vllm_tasks]\ntimeout = 3.5\n")
    assert site_settings().timeout == 3.5
    (folder / ".env").write_text("VLLM_TASKS_TIMEOUT=4\nOTHER=1\n")
    assert site_settings().timeout == 4
    monkeypatch.setenv("VLLM_TASKS_TIMEOUT", "5")
    assert site_settings().timeout == 5


def test_every_setting_can_stand_in_a_file(folder: Path) -> None:
    """Texts, numbers, booleans and lists, as TOML has them."""
    values = {
        str: '"text"',
        int: "1025",
        float: "2.5",
        bool: "false",
        list[str]: '["a", "b"]',
    }
    for name, field in Settings.model_fields.items():
        written = values.get(field.annotation, '"DEBUG"' if name == "log_level" else '"text"')  # type: ignore[arg-type]
        before = getattr(Settings(), name)
        (folder / "prefect.toml").write_text(f"[integrations.vllm_tasks]\n{name} = {written}\n")
        assert getattr(Settings(), name) != before, name


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "prefect.toml",
            f"[{TABLE}]\ntimeout = 0",
            rf"^timeout='0' in \[{TABLE}\] of {{}}: .*greater than 0.*Sec",
        ),
        (
            "pyproject.toml",
            f"[tool.prefect.{TABLE}]\nretries = 1.5",
            r"^retries='1.5' in \[tool.prefect.*\] of {}",
        ),
        (".env", "VLLM_TASKS_TIMEOUT=abc", r"^VLLM_TASKS_TIMEOUT='abc' in {}: .*valid number"),
        ("profiles.toml", PROFILES.format("no"), "^VLLM_TASKS_TIMEOUT='no' in the active profile of Prefect"),
        ("prefect.toml", f"[{TABLE}]\nplaces = 7", r"^places='7' in .*valid list"),
        ("prefect.toml", f"[{TABLE}]\napi_key = 7654321", r"^api_key=\*\*\* in .*valid string"),
        ("prefect.toml", "[integrations", "{}: invalid TOML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(folder: Path, file: str, text: str, said: str) -> None:
    """The refusal names the setting as it is written there, the file, and never a key."""
    (folder / file).write_text(text)
    with pytest.raises(InvalidCall, match=said.format(file)) as raised:
        site_settings()
    assert "7654321" not in str(raised.value)


def test_prefect_accepts_our_table_in_its_file(folder: Path) -> None:
    """A process of Prefect's with our table starts without a warning, and reads its own settings."""
    (folder / "prefect.toml").write_text(
        '[integrations.vllm_tasks]\ntimeout = 3\n[api]\nurl = "http://here/api"\n'
    )
    code = (
        "from prefect.settings import PREFECT_API_URL; from vllm_tasks.settings import site_settings; "
        "print(PREFECT_API_URL.value(), site_settings().timeout)"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:prefect", "-c", code],
        env={**variables, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=LONG_ENOUGH,
    )
    assert done.stdout.split() == ["http://here/api", "3.0"], done.stderr
    assert "Warning" not in done.stderr


def test_threads_read_a_file_at_the_same_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's cache of files would raise KeyError in one of them, where its entries expire meanwhile."""
    monkeypatch.setattr("prefect.settings.sources._file_cache", TTLCache(maxsize=100, ttl=1e-6))
    monkeypatch.setattr("vllm_tasks.settings._state", object)  # as if each time another file had changed
    (folder / "prefect.toml").write_text("[integrations.vllm_tasks]\ntimeout = 3.5\n")
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(lambda _: site_settings().timeout, range(500))) == {3.5}
    finally:
        sys.setswitchinterval(often)
