from __future__ import annotations

import pytest
import torch
from transformers import PretrainedConfig

from hatrack_trainer import distributed
from hatrack_trainer.distributed import (
    found_by_any,
    from_first,
    is_first,
    nf4_storage,
    one_voice,
    processes,
    shards_base,
)
from hatrack_trainer.errors import UsageError
from hatrack_trainer.methods.adalora import AdaLora


@pytest.fixture
def sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


def test_without_a_launcher_one_process_does_all() -> None:
    assert (processes(), is_first(), shards_base(), nf4_storage()) == (1, True, False, torch.uint8)
    assert found_by_any({"b", "a"}) == {"a", "b"}
    assert from_first(lambda: "done") == "done"


@pytest.mark.usefixtures("sharding")
def test_what_is_sharded_is_stored_as_it_computes() -> None:
    assert shards_base()
    assert nf4_storage() is torch.bfloat16


@pytest.mark.usefixtures("sharding")
def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match=r"^accelerate's configuration: must say fsdp_version: 2, as examples/fsdp"):
        shards_base()


@pytest.mark.usefixtures("sharding")
def test_adalora_is_refused_where_the_base_is_sharded() -> None:
    with pytest.raises(UsageError, match=r"^adapter.method: adalora can't be trained with FSDP; without, several"):
        AdaLora().refuse(PretrainedConfig())


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [distributed.GRACE_SECONDS])])
def test_an_error_is_told_by_the_first_process_while_others_wait(
    monkeypatch: pytest.MonkeyPatch, rank: str, waits: list[float]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(distributed.time, "sleep", waited.append)
    with pytest.raises(UsageError), one_voice():
        raise UsageError("wrong")
    assert waited == waits
