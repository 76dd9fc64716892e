from __future__ import annotations

import math
from pathlib import Path

import pytest
from make_inputs import CONFIGS, make_adapter, make_base, parts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workload import SHAPES


def test_a_base_is_written_in_parts_and_loads_as_one(tmp_path: Path) -> None:
    make_base(CONFIGS["tiny"], tmp_path / "base")
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(notes.values())
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 3 + CONFIGS["tiny"].num_hidden_layers
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.05)


def test_every_shape_has_a_configuration_of_its_size() -> None:
    assert tuple(CONFIGS) == SHAPES
    sizes = [sum(map(math.prod, part.values())) for part in parts(CONFIGS["llama-3-8b"])]
    assert sum(sizes) == 8_030_261_248
    assert max(sizes) < sum(sizes) / 10


def test_a_small_adapter_has_the_named_targets_only(tmp_path: Path) -> None:
    make_adapter(CONFIGS["tiny"], 0, tmp_path / "small", 8, ("q_proj", "v_proj"))
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "v_proj"}
    assert {min(tensor.shape) for tensor in tensors.values()} == {8}
