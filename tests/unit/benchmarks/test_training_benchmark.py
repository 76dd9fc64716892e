from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from make_inputs import byte_tokenizer
from setting import as_document
from tables import as_markdown
from training import TOKENS, protocol, summarize, write_rows
from training_clock import Clock


def measured(step_s: float, peak: int) -> dict[str, Any]:
    return {
        "steps_s": [step_s] * 2,
        "steps_peak_bytes": peak,
        "peak_bytes": 2 * peak,
        "losses": [3.0, 2.0, 1.0],
    }


RUNS = {
    "hatrack": [measured(1.0, 10**9), measured(3.0, 10**9)],
    "trl": [measured(4.0, 2 * 10**9), measured(4.0, 2 * 10**9)],
}


def test_ratios_are_hatracks_figures_over_the_others() -> None:
    found = summarize(RUNS, rows=2)
    assert found["hatrack"] == {"step_s": 2.0, "tokens_per_s": TOKENS, "steps_peak_gb": 1.0, "peak_gb": 2.0}
    assert found["ratio"] == {"tokens_per_s": 2.0, "steps_peak_gb": 0.5, "peak_gb": 0.5}


def test_rows_have_as_many_tokens_as_they_should(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 3)
    texts = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(set(texts)) == 3
    assert {len(byte_tokenizer()(text)["input_ids"]) for text in texts} == {TOKENS - 1}  # and the stop


def test_the_clock_leaves_the_first_step_out_and_keeps_the_highest_peak() -> None:
    clock = Clock()
    for loss in (3.0, 2.0, 1.0):
        clock.step(loss)
    found = clock.found()
    assert len(found["steps_s"]) == 2
    assert found["losses"] == [3.0, 2.0, 1.0]
    assert 0 < found["steps_peak_bytes"] <= found["peak_bytes"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_document_becomes_tables(checkpointing: bool) -> None:
    args = argparse.Namespace(
        shape="tiny", device="cpu", threads=2, rows=2, steps=2, runs=2, checkpointing=checkpointing
    )
    document = as_document("training", args, protocol(args) | summarize(RUNS, args.rows))
    page = as_markdown({"now": document}, {"now": []})
    assert "| hatrack | 2.0 | 256.0 | 1.0 | 2.0 |" in page
    assert "| tokens_per_s | 2.0 | 0.95 |" in page
