"""From a JSONL file to a promoted adapter, against a real server in its own process."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served
from tiny import CHAT_TEMPLATE, make_tokenizer

from hatrack.manifest import Manifest, folder_digest
from hatrack_client import Client, FinishReason, InvalidArgument
from hatrack_client.cli import run as hatrack
from hatrack_trainer.config import (
    BaseSection,
    DataSection,
    OutputSection,
    RegistrationSection,
    TrainConfig,
    TrainSection,
)
from hatrack_trainer.methods.lora import Lora
from hatrack_trainer.run import train

ROOT = Path(__file__).parents[2]
QUESTION, ANSWER = "Hello!", "Ahoy"


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tiny_llama, tmp_path_factory.mktemp("served") / "data") as served:
        yield served


@pytest.fixture
def client(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("HATRACK_SERVER", server.address)
    with Client(server.address, timeout=60) as connected:
        yield connected


def configure(base: Path, folder: Path, *, steps: int = 3, checkpoint_every: int = 500, **sections: Any) -> TrainConfig:
    """A run in `folder` that learns one chat."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    return TrainConfig(
        base=BaseSection(model=str(base)),
        adapter=Lora(rank=8),
        data=DataSection(train=rows),
        train=TrainSection(max_steps=steps, learning_rate=1e-2, schedule="constant"),
        output=OutputSection(dir=folder / "out", checkpoint_every=checkpoint_every),
        **sections,
    )


def with_template(checkpoint: Path, folder: Path, template: str) -> Path:
    """The same weights with other words around a message."""
    shutil.copytree(checkpoint, folder)
    make_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


def journey() -> list[list[str]]:
    """The commands of the README's training part."""
    part = (ROOT / "README.md").read_text().partition("## Train an adapter")[2]
    block = re.search(r"```\n(.*?)```", part, re.DOTALL)
    assert block
    lines = block[1].replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_takes_a_new_user_from_a_file_to_a_live_adapter_and_back(
    tiny_llama: Path,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = journey()
    assert len(commands) < 10
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct").symlink_to(tiny_llama)  # what the example trains on
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    said = []
    for program, *arguments in commands:
        assert program == "hatrack"
        assert hatrack(arguments) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out.strip())
    digests = [folder_digest(Path("runs", run)) for run in ("greetings", "more")]
    assert said[3] == f"greetings@1 ready {digests[0]}"
    assert said[5].splitlines()[-1] == (
        f"greetings@2 is staged (live by `hatrack adapters promote greetings 2`) and answers, digest {digests[1]}"
    )
    assert said[-2:] == ["greetings@2 is live", "greetings@1 is live"]
    assert Path("runs/greetings/training/loss.svg").is_file()
    assert [version.verified for version in client.get_adapter("greetings").versions] == [True, True]


def test_a_run_that_was_cut_short_is_registered_when_it_has_gone_on(
    tiny_llama: Path, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tiny_llama, tmp_path, checkpoint_every=1, registration=RegistrationSection(name="resumed"))

    def cut(step: int, _total: int, _loss: float) -> None:
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config, on_step=cut)
    assert hatrack(["train", "resume", str(config.output.dir), "--register"]) == 0
    digest = folder_digest(config.output.dir)
    assert capsys.readouterr().out.splitlines()[-1] == f"resumed@1 is live and answers, digest {digest}"
    assert client.get_adapter("resumed").versions[0].verified


def test_a_trained_adapter_answers_as_it_learned_and_stops(tiny_llama: Path, client: Client, tmp_path: Path) -> None:
    config = configure(tiny_llama, tmp_path, steps=40)
    train(config)
    client.push_adapter("ahoy", config.output.dir)
    chat = [{"role": "user", "content": QUESTION}]
    answer = client.generate("ahoy", messages=chat, temperature=0.0, max_tokens=40)
    assert (answer.text.strip(), answer.finish_reason) == (ANSWER, FinishReason.STOP)
    assert client.generate("", messages=chat, temperature=0.0, max_tokens=40).text != answer.text


def test_an_adapter_of_another_chat_template_is_refused(tiny_llama: Path, client: Client, tmp_path: Path) -> None:
    other = with_template(tiny_llama, tmp_path / "other", CHAT_TEMPLATE.replace("[assistant]", "[bot]"))
    config = configure(other, tmp_path)
    config.data.train.write_text('{"prompt": "a", "completion": "b"}\n')
    train(config)
    manifest = Manifest.from_json((config.output.dir / "manifest.json").read_text())
    served = client.get_base()
    assert (manifest.base.weights, manifest.base.tokenizer) == (served.weights, served.tokenizer)
    with pytest.raises(InvalidArgument) as caught:
        client.push_adapter("other", config.output.dir)
    assert str(caught.value) == (
        "manifest.json: base.chat_template: it was trained with another chat template than this server's"
    )


def test_a_base_with_another_template_costs_no_run(
    tiny_llama: Path, server: Served, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_template(tiny_llama, tmp_path / "other", CHAT_TEMPLATE + "\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    file, out = tmp_path / "train.yaml", tmp_path / "out"
    file.write_text(
        f"base: {{model: {other}}}\ndata: {{train: {tmp_path}/rows.jsonl}}\noutput: {{dir: {out}}}\n"
        "registration: {name: other}\n"
    )
    assert hatrack(["train", "run", str(file), "--register"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        f"hatrack: base.model: the server at {server.address} serves another base; they differ in: chat template"
    )
    assert (said.out, out.exists()) == ("", False)
