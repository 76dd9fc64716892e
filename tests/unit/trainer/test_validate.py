"""`hatrack train validate` as its user meets it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hatrack_client.cli import run as hatrack
from hatrack_trainer.config import DataSection
from hatrack_trainer.data import IGNORED, Example
from hatrack_trainer.data.lines import check_data_file
from hatrack_trainer.data.preview import preview
from hatrack_trainer.data.problems import quoted
from hatrack_trainer.data.read import read_data
from hatrack_trainer.data.remarks import format_remark, warnings
from hatrack_trainer.data.validate import checkpoint_without_weights
from hatrack_trainer.errors import DataError, UsageError

EOS = 257


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def configure(base: Path | str, folder: Path, **data: Any) -> Path:
    file = folder / "train.yaml"
    sections = {"base": {"model": str(base)}, "data": data, "output": {"dir": str(folder / "out")}}
    file.write_text(json.dumps(sections))  # JSON is YAML
    return file


@pytest.fixture(scope="module")
def weightless(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of a checkpoint without its weights."""
    folder = tmp_path_factory.mktemp("weightless") / "llama"
    return Path(shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors")))


class TestCommand:
    def test_sound_data_without_weights_or_torch(self, weightless: Path, tmp_path: Path) -> None:
        cache = tmp_path / "hub" / "models--some--base"
        shutil.copytree(weightless, cache / "snapshots" / "abc")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("abc")
        rows = write(tmp_path / "rows.jsonl", [chat("hi", "yo"), chat("so", "ok"), chat("why", "no")])
        config = configure("some/base", tmp_path, train=str(rows))
        code = "import sys; from hatrack_client.cli import run; sys.exit(run() or 70 * ('torch' in sys.modules))"
        command = [sys.executable, "-c", code, "train", "validate", str(config)]
        environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            "data.max_length: 512, for the base's 512 positions",
            f'{rows}: 3 rows read as chat, {{"messages": [{{"role", "content"}}, …]}}',
            "  76 tokens, of which 12 carry loss; longest 26, p50 25, p95 26; 0 of 3 rows lose their end",
            "line 1 as the model sees it, where only ⟦this⟧ is learned:",
            "<s>[user]hi↵",
            "[assistant]⟦yo↵",
            "</s>⟧",
        ]

    def test_a_file_for_a_base(self, weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
        assert hatrack(["train", "validate", str(rows), "--base", str(weightless)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "<s>a⟦b</s>⟧"
        assert hatrack(["train", "validate", str(rows)]) == 2
        assert "rows.jsonl: is data; name the base that is to learn it by --base" in capsys.readouterr().err

    def test_an_empty_base(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
        for command in (["train", "validate", str(rows)], ["adapters", "merge", "x", "--into=original", "--out=y"]):
            assert hatrack([*command, "--base", ""]) == 2
            assert capsys.readouterr().err == "hatrack: --base: is empty; name a checkpoint's folder, or a hub id\n"

    def test_an_absent_base(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"text": "a"}])
        config = configure("/nowhere", tmp_path, train=str(rows))
        for command in ("validate", "estimate", "run"):
            assert hatrack(["train", command, str(config)]) == 2
            assert capsys.readouterr().err.strip() == "hatrack: base.model: model path /nowhere does not exist"
        assert hatrack(["train", "validate", str(rows), "--base", "/nowhere"]) == 2
        assert capsys.readouterr().err == "hatrack: --base: model path /nowhere does not exist\n"
        assert hatrack(["train", "validate", str(rows), "--base", "x" * 300]) == 2
        assert capsys.readouterr().err.startswith("hatrack: --base: model xxx")

    def test_changes_of_the_configuration(
        self, weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"text": "ab"}])
        config = configure(weightless, tmp_path, train="absent.jsonl")
        assert hatrack(["train", "validate", str(config), "--set", f"data.train={rows}"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "<s>⟦ab</s>⟧"
        assert hatrack(["train", "validate", str(rows), "--base", str(weightless), "--set", "data.max_length=9"]) == 2
        assert "--set: changes a YAML file; with --base there is none" in capsys.readouterr().err

    def test_running_and_validating_refuse_with_the_same_list(
        self, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train = write(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": 1, "completion": "b"}])
        held_out = write(tmp_path / "held-out.jsonl", [[]])
        config = configure(tiny_llama, tmp_path, train=str(train), eval=str(held_out), max_length=64)
        for command in ("validate", "run"):
            assert hatrack(["train", command, str(config)]) == 2
            printed = capsys.readouterr()
            assert printed.out == ""
            assert printed.err.strip().splitlines() == [
                f"{train}:1: completion: missing",
                f"{train}:2: prompt: must be text, not a number",
                f"{held_out}: is one JSON array: write one object per line, as `jq -c '.[]'` does",
            ]
        assert not (tmp_path / "out").exists()

    def test_both_ends_of_a_pair_are_shown(
        self, weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        config = configure(weightless, tmp_path, train=str(pairs))
        assert hatrack(["train", "validate", str(config)]) == 0
        out = capsys.readouterr().out.splitlines()
        assert "2 rows read as preference" in out[1]
        assert out[-3:] == [
            "line 1 as the model sees it, where the first ⟦this⟧ is learned against the second:",
            "<s>a⟦b</s>⟧",
            "<s>a⟦c</s>⟧",
        ]

    def test_warnings_are_no_mistakes(
        self, weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"text": "abcdef"}, {"text": "ab"}])
        config = configure(weightless, tmp_path, train=str(rows), max_length=5)
        assert hatrack(["train", "validate", str(config)]) == 0
        out = capsys.readouterr().out.splitlines()
        cut = f"{rows}: max_length=5 cuts off the end of 1 row (line 1), of which no stop token is learned"
        assert out[2] == f"warning: {cut}"
        assert out[-1] == "<s>⟦ab</s>⟧"  # of a row that is whole


class TestRemarks:
    def test_unread_keys_are_named(self, tiny_llama: Path, tmp_path: Path) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"text": "a", "id": 1, "né": 2}])
        data = read_data(DataSection(train=rows), tiny_llama)
        assert format_remark(data.train) == f'{rows}: 1 row read as text, {{"text"}}; not read: "id", "né"'

    def test_a_likely_misspelling_is_a_warning(self, tiny_llama: Path, tmp_path: Path) -> None:
        row = {"instruction": "a", "imput": "x", "output": "b"}
        rows = write(tmp_path / "rows.jsonl", [row] * 7)
        data = read_data(DataSection(train=rows), tiny_llama)
        sentence = f'{rows}: "imput" is not read (did you mean "input"?) in 7 rows (lines 1, 2, 3, 4, 5 and 2 more)'
        assert warnings(data, 1024) == [sentence]

    def test_held_out_rows_that_are_not(self, tiny_llama: Path, tmp_path: Path) -> None:
        train = write(tmp_path / "rows.jsonl", [chat("hi", "yo"), chat("so", "ok")])
        held_out = [chat("hi", "no"), chat("ho", "yo"), chat("so", "ok"), chat("hi", "yo")]
        file = write(tmp_path / "held-out.jsonl", held_out)
        data = read_data(DataSection(train=train, eval=file), tiny_llama)
        sentence = f"{file}: its loss says little of new text, for {train} also has 2 rows (lines 3, 4)"
        assert warnings(data, 1024) == [sentence]


class TestPreview:
    def text(self, checkpoint: Path, example: Example) -> str:
        console = Console(file=StringIO(), width=40)
        with console.capture() as captured:
            console.print(preview(example, checkpoint), soft_wrap=True)
        return captured.get().removesuffix("\n")

    def test_every_learned_answer_with_its_stop(self, tiny_llama: Path, tmp_path: Path) -> None:
        talk = chat("hi", "yo")["messages"] + chat("so", "ok [b]:100:")["messages"]
        rows = write(tmp_path / "rows.jsonl", [{"messages": talk}])
        data = read_data(DataSection(train=rows, loss="assistant"), tiny_llama)
        assert self.text(tiny_llama, data.train.examples[0]).replace("↵\n", "|") == (
            "<s>[user]hi|[assistant]⟦yo|</s>⟧[user]so|[assistant]⟦ok [b]:100:|</s>⟧"
        )

    def test_a_long_prompt_loses_its_middle(self, tiny_llama: Path) -> None:
        shown = self.text(tiny_llama, Example([65] * 5000 + [EOS], [IGNORED] * 5000 + [EOS]))
        assert " … " in shown
        assert len(shown) < 1300
        assert shown.endswith("⟦</s>⟧")

    def test_control_characters_are_shown_not_obeyed(self, tiny_llama: Path, tmp_path: Path) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"text": "a\x1b[31mb\tc"}])
        data = read_data(DataSection(train=rows), tiny_llama)
        assert self.text(tiny_llama, data.train.examples[0]) == "<s>⟦a␛[31mb␉c</s>⟧"

    def test_neither_colours_nor_directions_come_from_a_row(self, tiny_llama: Path, tmp_path: Path) -> None:
        rows = write(tmp_path / "rows.jsonl", [{"text": "a\u009b31mb\u202ec\x7f ä"}])
        data = read_data(DataSection(train=rows), tiny_llama)
        assert self.text(tiny_llama, data.train.examples[0]) == "<s>⟦a\\u009b31mb\\u202ec\\u007f ä</s>⟧"

    def test_colours_where_there_are_any(self, tiny_llama: Path) -> None:
        spans = preview(Example([256, 65, EOS], [IGNORED, 65, EOS]), tiny_llama).spans
        assert [str(span.style) for span in spans] == ["dim", "bold green"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"base\.model: .* has no tokenizer\.json"):
        checkpoint_without_weights(str(tmp_path))


def test_a_pipe_is_refused_where_it_would_hang(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="is no file"):
        check_data_file(pipe)


def test_no_control_of_the_terminal_comes_from_a_row() -> None:
    assert quoted("\u009b31m\u202e ä") == '"\\u009b31m\\u202e ä"'
