from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hatrack.manifest import BaseIdentity, Manifest
from hatrack_trainer.artifact import public_name
from hatrack_trainer.log import LogEntry, as_json_lines, log_entries, losses
from hatrack_trainer.loss_plot import draw_losses, smoothed
from hatrack_trainer.model_card import model_card

# As transformers' Trainer keeps it: two steps, an evaluation, and a summary that is no step.
HISTORY = [
    {"loss": 2.5, "grad_norm": 1.25, "learning_rate": 1e-3, "epoch": 0.5, "step": 1},
    {"loss": 1.5, "grad_norm": 0.75, "learning_rate": 5e-4, "epoch": 1.0, "step": 2},
    {"eval_loss": 1.75, "eval_runtime": 0.1, "epoch": 1.0, "step": 2},
    {"train_runtime": 3.0, "train_loss": 2.0, "epoch": 1.0, "step": 2},
]


def test_the_log_has_steps_and_evaluations_alone() -> None:
    entries = log_entries(HISTORY)
    assert entries == [LogEntry(1, 2.5, None, 1.25, 1e-3), LogEntry(2, 1.5, None, 0.75, 5e-4), LogEntry(2, None, 1.75)]
    assert losses(entries, "loss") == [(1, 2.5), (2, 1.5)]
    assert losses(entries, "eval_loss") == [(2, 1.75)]


def test_a_line_of_the_log_has_what_was_measured() -> None:
    lines = as_json_lines(log_entries(HISTORY)).splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 2.5, "grad_norm": 1.25, "learning_rate": 1e-3}
    assert json.loads(lines[2]) == {"step": 2, "eval_loss": 1.75}


def test_equal_logs_give_equal_figures(tmp_path: Path) -> None:
    entries = log_entries(HISTORY)
    first = [file.read_bytes() for file in draw_losses(entries, tmp_path / "loss")]
    assert first == [file.read_bytes() for file in draw_losses(entries, tmp_path / "loss")]
    assert b"held-out rows" in first[0]
    assert first[1].startswith(b"\x89PNG")


def test_a_run_without_evaluation_is_drawn_too(tmp_path: Path) -> None:
    svg, _ = draw_losses(log_entries(HISTORY[:1]), tmp_path / "loss")
    assert b"held-out rows" not in svg.read_bytes()


def test_the_drawn_mean_is_over_a_twentieth_of_the_run() -> None:
    assert smoothed([4.0, 2.0]) == [4.0, 2.0]
    assert smoothed([float(n) for n in range(40)])[-2:] == [37.5, 38.5]


@pytest.mark.parametrize("base", ["my base: v2", "#1", "*star", "org/base"])
def test_any_name_of_a_base_is_yaml_in_the_cards_head(base: str) -> None:
    data = {"file": "f", "rows": 1}
    training = {"steps": 1, "loss": 1.0, "data": data, "settings": {}, "libraries": {"hatrack": "0"}}
    manifest = Manifest("f" * 64, BaseIdentity("0" * 64, "none", "0" * 64, ""), "LORA", training)
    head = yaml.safe_load(model_card(base, manifest).split("---\n")[1])
    assert head == {"library_name": "peft", "base_model": base, "tags": ["hatrack", "LORA"]}


def test_of_a_path_the_folder_alone_is_public(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert [public_name(str(tmp_path / "base")), public_name("org/base")] == ["base", "org/base"]


def test_the_card_says_what_was_trained_on_what() -> None:
    training = {
        "steps": 3,
        "loss": 1.23456,
        "eval_loss": None,
        "data": {"file": "rows.jsonl", "rows": 8},
        "settings": {"learning_rate": 5e-3},
        "libraries": {"hatrack": "0.1"},
    }
    base = BaseIdentity("0" * 64, "nf4-double-64", "0" * 64, "")
    card = model_card("org/base", Manifest("f" * 64, base, "LOHA", training))
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"
    assert "LOHA, trained by Hatrack 0.1 in 3 steps on 8 rows of `rows.jsonl`; loss 1.2346." in card
    assert "| learning_rate | 0.005 |" in card
