from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from bitsandbytes.optim import AdamW
from torch.nn import Parameter
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from hatrack_trainer.config import Optimizer, Tracker
from hatrack_trainer.config_file import load_config
from hatrack_trainer.errors import ConfigError, UsageError
from hatrack_trainer.optimizers import (
    PAGED,
    UNPAGED,
    PagedStates,
    PagingReport,
    fallback_remark,
    paged_states,
    runnable,
)
from hatrack_trainer.trackers import DISTRIBUTIONS, check_trackers


def stepped(optim_bits: int) -> AdamW:
    """Of bitsandbytes, after a step on a matrix of 8,192 elements and a vector of 8."""
    parameters = [Parameter(torch.ones(64, 128)), Parameter(torch.ones(8))]
    optimizer = AdamW(parameters, optim_bits=optim_bits)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


class TestPagedStates:
    def test_states_in_32_bits(self) -> None:
        assert paged_states(stepped(32)) == PagedStates(0, 4, 0, 2 * 4 * (8192 + 8))

    def test_states_in_8_bits_where_the_tensor_is_large_enough(self) -> None:
        assert paged_states(stepped(8)) == PagedStates(0, 4, 0, 2 * (8192 + 4 * 8))

    def test_torch_s_own_states(self) -> None:
        parameter = Parameter(torch.ones(10))
        optimizer = torch.optim.AdamW([parameter])
        parameter.grad = torch.ones(10)
        optimizer.step()
        assert paged_states(optimizer) == PagedStates(0, 2, 0, 80)

    def test_what_is_paged_is_counted(self) -> None:
        optimizer = stepped(32)
        for name in ("state1", "state2"):
            # As bitsandbytes marks what it allocates paged (functional.py, `get_paged`), which takes a GPU.
            next(iter(optimizer.state.values()))[name].is_paged = True
        assert str(paged_states(optimizer)) == "2 of 4 optimizer states, 0.1 of 0.1 MB"

    @pytest.mark.parametrize("name", [OptimizerNames.PAGED_ADAMW, OptimizerNames.ADAMW_8BIT])
    def test_it_is_said_once_of_an_optimizer_that_should_page(self, name: OptimizerNames) -> None:
        said: list[str] = []
        report = PagingReport(said.append)
        for _ in range(2):
            report.on_step_end(SimpleNamespace(optim=name), None, None, optimizer=stepped(32))
        assert said == ["paged: 0 of 4 optimizer states, 0.0 of 0.1 MB"] * name.startswith(PAGED)


class TestFallback:
    def test_transformers_knows_every_optimizer(self) -> None:
        assert set(get_args(Optimizer)) <= {name.value for name in OptimizerNames}
        assert {name for name in get_args(Optimizer) if name.startswith(PAGED)} == UNPAGED.keys()
        assert set(UNPAGED.values()) <= set(get_args(Optimizer))

    def test_pages_are_cuda_s(self) -> None:
        assert runnable("paged_lion_8bit", cuda=True) == "paged_lion_8bit"
        assert fallback_remark("paged_lion_8bit", cuda=True) is None
        assert fallback_remark("adamw_8bit", cuda=False) is None
        assert fallback_remark("paged_lion_8bit", cuda=False) == (
            "paged_lion_8bit pages CUDA's memory: on the CPU this run uses lion_8bit, the same unpaged"
        )


class TestTrackers:
    def test_transformers_knows_every_tracker(self) -> None:
        assert set(get_args(Tracker)) <= INTEGRATION_TO_CALLBACK.keys()

    @pytest.mark.parametrize("tracker", [name for name in get_args(Tracker) if find_spec(name) is None])
    def test_one_that_is_not_installed_is_named_with_its_package(self, tracker: Tracker) -> None:
        with pytest.raises(UsageError) as caught:
            check_trackers([tracker])
        package = DISTRIBUTIONS.get(tracker, tracker)
        assert str(caught.value) == f"train.trackers: {tracker} is not installed: pip install {package}"

    def test_none_is_the_default(self) -> None:
        check_trackers([])

    @pytest.mark.parametrize(
        ("section", "sentence"),
        [
            (
                "{trackers: [tensorboard]}",
                "train.logging_dir: missing; tensorboard, in train.trackers, writes its files there",
            ),
            (
                "{trackers: [tensorboard], logging_dir: out/events}",
                "train.logging_dir: must lie outside output.dir, which is written as a whole",
            ),
        ],
    )
    def test_event_files_need_a_place_of_their_own(self, tmp_path: Path, section: str, sentence: str) -> None:
        file = tmp_path / "train.yaml"
        file.write_text(f"base: {{model: b}}\ndata: {{train: a.jsonl}}\noutput: {{dir: out}}\ntrain: {section}\n")
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert str(caught.value) == f"{file}: {sentence}"
