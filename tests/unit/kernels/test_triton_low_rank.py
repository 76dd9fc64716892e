"""The low-rank product's GPU kernels without a GPU: their results in Triton's interpreter, and that they compile."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import low_rank_checks as checks
import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

Call = Callable[..., Any]

EACH_HEIGHT = ["zipf", "short prompts", "a long prompt among decodes"]  # of tiles


def in_a_process(**environment: str) -> Iterator[Call]:
    """What calls a function in a process of its own: Triton reads the environment once, when it is imported."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(torch.set_num_threads, 1).result()
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def interpret() -> Iterator[Call]:
    yield from in_a_process(TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    yield from in_a_process(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("batch", checks.BATCHES)
def test_equals_the_reference(interpret: Call, batch: str) -> None:
    interpret(checks.check_batch, batch, 8, torch.float32)


@pytest.mark.parametrize("rank", [1, 16, 64, 128])
@pytest.mark.parametrize("batch", EACH_HEIGHT)
def test_ranks_in_half_precision(interpret: Call, batch: str, rank: int) -> None:
    interpret(checks.check_batch, batch, rank, torch.float16)


def test_a_long_batch(interpret: Call) -> None:
    interpret(checks.check_long_batch, "short prompts")


def test_one_table_for_each_batch_in_turn(interpret: Call) -> None:
    interpret(checks.check_fixed_runs, ["zipf", "base alone", "distinct", "among the base", "all same", "no tokens"])


def test_pools_of_another_dtype_than_the_layers(interpret: Call) -> None:
    interpret(checks.check_pools_of_another_dtype, "short prompts", torch.float16)


@pytest.mark.parametrize("batch", ["among the base", "short prompts"])
def test_the_input_may_be_the_output(interpret: Call, batch: str) -> None:
    interpret(checks.check_input_that_is_the_output, batch)


def test_tokens_that_are_not_contiguous(interpret: Call) -> None:
    interpret(checks.check_strided_tokens, "short prompts")


@pytest.mark.parametrize("batch", EACH_HEIGHT)
def test_a_bad_adapter_touches_its_own_tokens_only(interpret: Call, batch: str) -> None:
    interpret(checks.check_bad_adapter, batch, torch.float32)


@pytest.mark.parametrize("batch", EACH_HEIGHT)
def test_a_bad_token_touches_no_other_of_its_adapter(interpret: Call, batch: str) -> None:
    interpret(checks.check_bad_token, batch)


@pytest.mark.parametrize(("batch", "capability"), [*((batch, 80) for batch in EACH_HEIGHT), (EACH_HEIGHT[-1], 90)])
def test_compiles_for_gpus(compiling: Call, batch: str, capability: int) -> None:
    compiling(checks.check_compiles, batch, 64, torch.bfloat16, capability)
