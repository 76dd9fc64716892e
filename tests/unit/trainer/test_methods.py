from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from peft import PeftType
from transformers import AutoConfig, PretrainedConfig

from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods import Method, methods, read_method

# What a section must say besides its method.
NEEDED: dict[str, dict[str, Any]] = {"llama_adapter": {"layers": 2}, "partial": {"parts": ["lm_head"]}}
PEFT_TYPES = {
    "adalora": "ADALORA",
    "bottleneck": "BOTTLENECK",
    "dora": "LORA",
    "ia3": "IA3",
    "llama_adapter": "ADAPTION_PROMPT",
    "loha": "LOHA",
    "lokr": "LOKR",
    "lora": "LORA",
    "p_tuning": "P_TUNING",
    "partial": "PARTIAL",
    "prefix_tuning": "PREFIX_TUNING",
    "prompt_tuning": "PROMPT_TUNING",
    "rslora": "LORA",
    "vera": "VERA",
}


def section(method: str, **keys: Any) -> Method:
    read: Method = read_method({"method": method, **NEEDED.get(method, {}), **keys})
    return read


def base_of(kind: str) -> PretrainedConfig:
    return AutoConfig.for_model(kind, num_hidden_layers=2)


def test_every_method_is_found_by_its_name() -> None:
    assert list(methods()) == sorted(PEFT_TYPES)
    assert {name: section(name).method for name in PEFT_TYPES} == {name: name for name in PEFT_TYPES}


@pytest.mark.parametrize("method", PEFT_TYPES)
def test_a_section_is_a_configuration_for_peft(method: str) -> None:
    config = section(method).peft_config()
    assert config.peft_type == PeftType(PEFT_TYPES[method])
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("method", PEFT_TYPES)
def test_defaults_suit_a_llama(method: str) -> None:
    one = section(method)
    one.refuse(base_of("llama"))
    assert one.named_layers() == []
    assert 0 < one.default_learning_rate < 1


def test_what_kind_of_lora_it_is() -> None:
    kinds = {
        name: (section(name).peft_config().use_rslora, section(name).peft_config().use_dora)
        for name in ("lora", "rslora", "dora")
    }
    assert kinds == {"lora": (False, False), "rslora": (True, False), "dora": (False, True)}


def test_reading_sections_needs_no_torch() -> None:
    read = "import hatrack_trainer.config_file; from hatrack_trainer.methods import methods; methods()"
    program = f"import sys; {read}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("method", ["ia3", "bottleneck"])
def test_targets_of_an_unknown_kind_of_base_must_be_given(method: str) -> None:
    with pytest.raises(UsageError, match=r"^adapter.target_modules: must be given, since the \w+ of cohere2 are not"):
        section(method).refuse(base_of("cohere2"))
    given = {"feedforward_modules": []} if method == "ia3" else {}
    named = section(method, target_modules=["q_proj"], **given)
    named.refuse(base_of("cohere2"))
    assert named.named_layers() == ["q_proj"]


def test_so_must_the_feedforward_ones_be() -> None:
    with pytest.raises(UsageError, match=r"^adapter.feedforward_modules: must be given"):
        section("ia3", target_modules=["q_proj"]).refuse(base_of("cohere2"))


def test_a_llama_adapter_needs_a_llama() -> None:
    with pytest.raises(UsageError, match=r"^adapter.method: llama_adapter needs a base of .*, not qwen2$"):
        section("llama_adapter").refuse(base_of("qwen2"))
    with pytest.raises(UsageError, match=r"^adapter.layers: the base has 2"):
        section("llama_adapter", layers=3).refuse(base_of("mistral"))
