from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from contract.fake_engine import BASE
from rich.console import Console
from tiny import make_checkpoint

from hatrack_server.config import EngineConfig
from hatrack_server.engine.worker import describe_base
from hatrack_server.model.paged import PagedModel
from hatrack_server.startup import base_table, bits_per_weight, lora_bytes
from hatrack_server.types import BaseInfo


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose linear layers are wide enough for their scales' own scales not to weigh."""
    path = tmp_path_factory.mktemp("wide")
    return make_checkpoint(path, hidden_size=256, intermediate_size=512, num_hidden_layers=1)


def loaded(checkpoint: Path, **settings: object) -> BaseInfo:
    config = EngineConfig.model_validate(
        {"model": checkpoint, "device": "cpu", "kv_cache_gb": 0.004, "adapter_gb": 0.01, **settings}
    )
    return describe_base(config, PagedModel(config))


def lines(base: BaseInfo) -> list[str]:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(base_table(base))
    return captured.get().splitlines()


def line(base: BaseInfo, word: str) -> str:
    [found] = [one for one in lines(base) if word in one]
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_the_loaded_base_takes_at_most_4_3_bits_per_weight(wide: Path, packed: bool) -> None:
    bits = bits_per_weight(loaded(wide, packed=packed))
    assert bits is not None
    assert 4.1 <= bits <= 4.3


def test_the_table_says_what_takes_how_much(wide: Path) -> None:
    base = loaded(wide, host_adapter_gb=0.02)
    assert "bits per weight" in line(base, "NF4 weights")
    assert f"{base.kv_tokens:,} tokens" in line(base, "KV cache")
    per_layer = 3 * (256 + 512) + 2 * (256 + 256) + 2 * (256 + 128)  # in and out of the MLP, of q and o, of k and v
    assert lora_bytes(base, 16) == 2 * 16 * per_layer
    assert f"{10_000_000 // lora_bytes(base, 16)} LoRAs of rank 16" in line(base, "LoRAs")
    assert "10.0" in line(base, "LoRAs")
    assert "20.0" in line(base, "evicted adapters")
    assert f"{sum(base.memory.values()) / 1e6:,.1f}" in line(base, "sum")


def test_a_base_that_is_not_quantised_has_no_bits() -> None:
    assert bits_per_weight(BASE) is None
    assert bits_per_weight(replace(BASE, memory={"NF4 weights": 0})) is None
    assert "bits" not in "".join(lines(replace(BASE, memory={"NF4 weights": 0, "other weights": 5})))
