from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hatrack_server.commands import configure
from hatrack_server.config import EngineConfig, ServerConfig
from hatrack_server.errors import StartupError

ENGINE = EngineConfig(model=Path("base"))
PEM = Path("a.pem")


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_loopback(host: str, loopback: bool) -> None:
    assert ServerConfig(engine=ENGINE, host=host, insecure=True).loopback is loopback


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "is not loopback"),
        ({"tls_cert": PEM}, "go together"),
        ({"port": 70_000}, "less than or equal to 65535"),
        ({"prot": 1}, "Extra inputs"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServerConfig(engine=ENGINE, **settings)


def test_beyond_loopback_with_tls() -> None:
    assert not ServerConfig(engine=ENGINE, host="0.0.0.0", tls_cert=PEM, tls_key=PEM).loopback


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ENGINE.max_rows = 3  # type: ignore[misc]


def test_rows_fit_a_step() -> None:
    with pytest.raises(ValidationError, match="max_step_tokens"):
        EngineConfig(model=Path("base"), max_rows=64, max_step_tokens=32)


class TestCommandLine:
    @pytest.fixture
    def base(self, tmp_path: Path) -> str:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (tmp_path / name).write_text("{}")
        return str(tmp_path)

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "hatrack.yaml"

    def test_options_reach_their_place(self, base: str) -> None:
        config = configure({"model": base, "port": 0, "max_rows": 8}, None)
        assert (config.engine.model, config.port, config.engine.max_rows) == (Path(base), 0, 8)

    def test_the_command_line_wins_over_the_file(self, base: str, file: Path) -> None:
        file.write_text(f"port: 1\ndrain_seconds: 5\nengine: {{model: {base}, max_rows: 2, kv_cache_gb: 3}}\n")
        config = configure({"port": 2, "max_rows": 4}, file)
        assert (config.port, config.drain_seconds, config.engine.max_rows) == (2, 5, 4)
        assert config.engine.kv_cache_gb == 3

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, r"--model is missing"),
            ({"model": "/nowhere/at-all"}, r"/nowhere/at-all"),
            ({"model": "base", "max_rows": 0}, r"--max-rows: .* greater than or equal to 1 \(got 0\)"),
            ({"model": "base", "device": "tpu"}, r"--device: .*\(got 'tpu'\)"),
            ({"model": "base", "host": "0.0.0.0"}, r"^host 0.0.0.0 is not loopback"),
            ({"model": "base", "max_rows": 9999}, r"^max_rows \(9999\) must not exceed"),
        ],
    )
    def test_one_sentence_names_the_option(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(StartupError, match=message) as caught:
            configure(given, None)
        assert "\n" not in caught.value.message

    @pytest.mark.parametrize(
        ("text", "message"),
        [("[1]", "mapping"), ("a: [", "not YAML"), ("engine: 3", "mapping"), ("prot: 1", r"hatrack.yaml: prot: ")],
    )
    def test_a_wrong_file(self, file: Path, text: str, message: str) -> None:
        file.write_text(text)
        with pytest.raises(StartupError, match=message):
            configure({} if text.startswith("engine") else {"model": "base"}, file)

    def test_an_absent_file(self, file: Path) -> None:
        with pytest.raises(StartupError, match="No such file"):
            configure({}, file)
