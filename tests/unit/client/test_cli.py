from __future__ import annotations

import io
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import grpc
import pytest

from hatrack_client import cli


@pytest.fixture
def hatrack(server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line against the canned server: (status, stdout, stderr)."""
    monkeypatch.setenv("HATRACK_SERVER", server.address)

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.run(args)
        return status, *capsys.readouterr()

    return run


def test_generate_prints_the_text(server: Any, hatrack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HATRACK_API_KEY", "hat-1")
    options = ("--max-tokens", "9", "--temperature", "0", "--stop", "a", "--stop", "b", "--seed", "3")
    assert hatrack("generate", "hi", "--adapter", "tone@2", *options) == (0, "two hats\n", "")
    [request] = server.requests
    assert (request.adapter, request.prompt) == ("tone@2", "hi")
    assert request.sampling.max_tokens == 9
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert request.sampling.stop == ["a", "b"]
    assert server.metadata["authorization"] == "Bearer hat-1"


def test_generate_streams_a_chat_from_standard_input(
    server: Any, hatrack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    assert hatrack("generate", "--stream", "--system", "short") == (0, "two hats\n", "")
    [request] = server.requests
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "short"), ("user", "hi")]


def test_push_prints_the_version_and_warns(server: Any, hatrack: Any, folder: Path) -> None:
    status, out, err = hatrack("adapters", "push", "tone", str(folder))
    assert (status, out) == (0, f"tone@1 ready {1:064x}\n")
    assert err == "hatrack: warning: another chat template\n"


def test_adapters_are_listed_shown_changed_and_deleted(server: Any, hatrack: Any) -> None:
    server.hang("tone", live=2, versions=3)
    server.hang("voice", live=1, versions=1)
    _, out, _ = hatrack("adapters", "list")
    assert [line.split() for line in out.splitlines()] == [
        ["name", "live", "versions", "method", "rank"],
        ["tone", "2", "3", "LORA", "8"],
        ["voice", "1", "1", "LORA", "8"],
    ]
    _, out, _ = hatrack("adapters", "get", "tone")
    assert [line.split()[0] for line in out.splitlines()] == ["version", "3", "2", "1"]
    assert "2 (live)" in out
    _, out, _ = hatrack("adapters", "get", "tone@1")
    assert len(out.splitlines()) == 2
    assert hatrack("adapters", "promote", "tone", "3") == (0, "tone@3 is live\n", "")
    assert hatrack("adapters", "rollback", "tone") == (0, "tone@2 is live\n", "")
    assert hatrack("adapters", "rm", "voice") == (0, "voice is deleted\n", "")
    assert list(server.adapters) == ["tone"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.UNAUTHENTICATED, 2),
        (grpc.StatusCode.NOT_FOUND, 2),
        (grpc.StatusCode.ABORTED, 2),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_refusal_is_one_sentence_and_tells_whose_fault_it_is(
    server: Any, hatrack: Any, code: grpc.StatusCode, status: int, stream: tuple[str, ...]
) -> None:
    server.fail(code, "no hat fits")
    assert hatrack("generate", "hi", *stream) == (status, "", "hatrack: no hat fits\n")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("wear",), "wear"),
        (("generate", "hi", "--tempature", "1"), "--tempature"),
        (("adapters", "promote", "tone", "zero"), "version"),
        (("adapters", "push", "tone", "/nowhere"), "/nowhere"),
        (("adapters", "get", "\udcff"), "UTF-8"),
        (("generate", "\udcff"), "prompt"),
        (("generate", "hi", "--tls-ca", "/nowhere.pem"), "--tls-ca: /nowhere.pem"),
        (("generate", "hi", "--tls-ca", __file__), "holds no certificate"),
        (("generate", "hi", "--server", ""), "--server: must be HOST:PORT"),
        (("generate", "hi", "--api-key", "Schlüssel"), "--api-key: must be ASCII"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exits_with_2(hatrack: Any, args: tuple[str, ...], named: str) -> None:
    status, out, err = hatrack(*args)
    assert (status, out) == (2, "")
    assert err.startswith("hatrack: ")
    assert named in err
    assert err.count("\n") == 1


def test_help_lists_every_command_without_importing_it(hatrack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("polish", "no_such_package:polish", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: (broken,))
    status, out, _ = hatrack("--help")
    assert status == 0
    assert {"generate", "adapters", "polish"} <= set(out.split())


def test_serve_keys_train_and_demo_are_found() -> None:
    listed = subprocess.run([sys.executable, "-m", "hatrack_client", "--help"], capture_output=True, text=True)
    assert listed.returncode == 0
    assert {"generate", "adapters", "serve", "keys", "train", "demo"} <= set(listed.stdout.split())


def test_generate_imports_nothing_heavy(server: Any) -> None:
    script = (
        "import sys; from hatrack_client.cli import run; "
        f"status = run(['generate', 'hi', '--server', '{server.address}']); "
        "heavy = {'torch', 'transformers', 'peft', 'hatrack_server', 'hatrack_trainer'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "two hats\n", "")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module the home of the commands `polish` (a function) and `brims` (a group)."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "EXTRAS", {"hat_plugin": "server"})
    commands = tuple(EntryPoint(name, f"hat_plugin:{name}", cli.GROUP) for name in ("polish", "brims"))
    monkeypatch.setattr(cli, "entry_points", lambda group: commands)

    def write(source: str) -> None:
        (tmp_path / "hat_plugin.py").write_text(source)

    yield write
    sys.modules.pop("hat_plugin", None)


def test_a_function_becomes_a_command_and_a_typer_a_group(hatrack: Any, plugin: Any) -> None:
    plugin(
        "import typer\n"
        "def polish(hat: str, twice: bool = False) -> None: print('polished', hat, twice)\n"
        "brims = typer.Typer()\n"
        "@brims.command()\n"
        "def cut(size: int) -> None: print('cut', size)\n"
        "@brims.command()\n"
        "def sew() -> None: print('sewn')\n"
    )
    assert hatrack("polish", "bowler", "--twice") == (0, "polished bowler True\n", "")
    assert hatrack("brims", "cut", "7") == (0, "cut 7\n", "")


@pytest.mark.parametrize("source", ["import absent_felt\n", "def polish() -> None: import absent_felt\n"])
def test_a_missing_extra_names_what_to_install(hatrack: Any, plugin: Any, source: str) -> None:
    plugin(source)
    sentence = "hatrack: `hatrack polish` needs the package absent_felt: pip install 'hatrack[server]'\n"
    assert hatrack("polish") == (2, "", sentence)


def test_a_missing_module_of_our_own_is_a_bug_and_stays_one(hatrack: Any, plugin: Any) -> None:
    plugin("import hatrack_absent\n")
    with pytest.raises(ModuleNotFoundError, match="hatrack_absent"):
        hatrack("polish")
