"""Rows must fit the base's positions, and are told to before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hatrack_client.cli import run as hatrack
from hatrack_trainer.config import DataSection
from hatrack_trainer.context import rows_within_context
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods.virtual_tokens import PromptTuning


def fitted(folder: Path, base: dict[str, Any], tokens: int = 0, **data: Any) -> tuple[int, list[str]]:
    (folder / "config.json").write_text(json.dumps(base))
    said: list[str] = []
    adapter = PromptTuning(tokens=tokens) if tokens else None
    section = rows_within_context(DataSection(train=folder / "rows", **data), adapter, folder, said.append)
    again = rows_within_context(section, adapter, folder, said.append)
    assert again == section
    return section.max_length, said


def test_an_absent_length_is_what_the_base_has_positions_for(tmp_path: Path) -> None:
    assert fitted(tmp_path, {"max_position_embeddings": 2048}) == (1024, [])
    assert fitted(tmp_path, {}) == (1024, [])
    assert fitted(tmp_path, {"n_positions": 512}) == (512, ["data.max_length: 512, for the base's 512 positions"])
    part = {"max_position_embeddings": 4096, "text_config": {"max_position_embeddings": 512}}
    sentence = "data.max_length: 492, for the base's 512 positions, of which adapter.tokens takes 20"
    assert fitted(tmp_path, part, tokens=20) == (492, [sentence])


def test_a_length_that_is_set_must_fit(tmp_path: Path) -> None:
    base = {"max_position_embeddings": 512}
    assert fitted(tmp_path, base, tokens=20, max_length=492) == (492, [])
    with pytest.raises(
        UsageError, match=r"^data\.max_length: 513 is more than the base's 512 positions; 512 is the most$"
    ):
        fitted(tmp_path, base, max_length=513)
    with pytest.raises(
        UsageError, match=r"^data\.max_length: 1024 is .*, of which adapter\.tokens takes 20; 492 is the"
    ):
        fitted(tmp_path, base, tokens=20, max_length=1024)
    with pytest.raises(UsageError, match=r"^adapter\.tokens: 600 leave no room for text in the base's 512 positions$"):
        fitted(tmp_path, base, tokens=600)


@pytest.mark.parametrize("command", ["validate", "estimate", "run"])
def test_every_command_refuses_it(
    tiny_llama: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    sections = {
        "base": {"model": str(tiny_llama)},
        "data": {"train": str(rows), "max_length": 600},
        "output": {"dir": str(tmp_path / "out")},
    }
    (tmp_path / "train.yaml").write_text(json.dumps(sections))
    assert hatrack(["train", command, str(tmp_path / "train.yaml")]) == 2
    told = "hatrack: data.max_length: 600 is more than the base's 512 positions; 512 is the most\n"
    assert capsys.readouterr().err.endswith(told)
