from __future__ import annotations

import json
from pathlib import Path

import pytest
from hatrack_system import step_bytes
from register import make_copy
from workload import DECODE_STEPS, PROMPT_TOKENS, Case, decode_ms, with_bases


def test_a_case_spreads_its_rows_over_its_adapters() -> None:
    assert Case.parse("4x2").adapters() == ["a0", "a1", "a0", "a1"]
    assert Case.parse("2x0").adapters() == ["", ""]
    with pytest.raises(ValueError, match="no more adapters than rows"):
        Case.parse("1x2")


def test_no_prompt_comes_twice() -> None:
    prompts = Case(4, 0).prompts(0, "decode") + Case(4, 0).prompts(1, "decode") + Case(4, 4).prompts(0, "decode")
    assert {len(prompt) for prompt in prompts} == {PROMPT_TOKENS}
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)


def test_every_number_of_rows_is_measured_without_adapters() -> None:
    cases = with_bases([Case(1, 1), Case(8, 4), Case(8, 8), Case(1, 0)])
    assert list(map(str, cases)) == ["1x0", "8x0", "1x1", "8x4", "8x8"]


def test_a_decode_step_counts_from_when_all_rows_decode() -> None:
    early = [float(n) for n in range(DECODE_STEPS + 10)]
    late = [5.0 + n for n in range(DECODE_STEPS + 10)]
    assert decode_ms([early, late]) == 1000


def test_a_step_reads_all_weights_but_an_embedding_of_its_own(tmp_path: Path) -> None:
    memory = {"NF4 weights": 1000, "other weights": 500, "KV cache": 9999}
    config = {"vocab_size": 10, "hidden_size": 4, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert step_bytes(tmp_path, memory) == 1500 - 10 * 4 * 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert step_bytes(tmp_path, memory) == 1500


def test_copies_differ_and_stay_finite(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    template = tmp_path / "template"
    template.mkdir()
    save_file({"w": torch.ones(16, dtype=torch.bfloat16)}, template / "adapter_model.safetensors")
    copies = [make_copy(template, tmp_path / str(number), number) for number in (0, 1, 127, 128, 5000)]
    values = [load_file(copy / "adapter_model.safetensors")["w"] for copy in copies]
    assert len({tuple(value.tolist()) for value in values}) == len(copies)
    assert all(value.isfinite().all() for value in values)
