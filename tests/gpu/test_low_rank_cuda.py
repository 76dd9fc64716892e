"""The low-rank product's kernels on a CUDA device: skipped where there is none."""

from __future__ import annotations

import low_rank_checks as checks
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Triton's own, about a default of its next version.
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]


@pytest.mark.parametrize("rank", [1, 8, 16, 64, 128])
@pytest.mark.parametrize("batch", checks.BATCHES)
def test_equals_the_reference(batch: str, rank: int) -> None:
    checks.check_batch(batch, rank, torch.bfloat16, "cuda")


@pytest.mark.parametrize("batch", checks.BATCHES)
def test_equals_the_reference_in_float32(batch: str) -> None:
    checks.check_batch(batch, 16, torch.float32, "cuda")


@pytest.mark.parametrize("batch", ["zipf", "short prompts", "a long prompt among decodes"])
def test_rows_never_mix(batch: str) -> None:
    checks.check_bad_adapter(batch, torch.bfloat16, "cuda")
    checks.check_bad_token(batch, "cuda")


def test_other_dtypes_and_layouts() -> None:
    checks.check_pools_of_another_dtype("short prompts", torch.bfloat16, "cuda")
    checks.check_input_that_is_the_output("short prompts", "cuda")
    checks.check_strided_tokens("short prompts", "cuda")
    checks.check_fixed_runs(["zipf", "base alone", "among the base", "all same"], "cuda")
    checks.check_long_batch("a long prompt among decodes", "cuda")


def test_nothing_waits_for_the_device() -> None:
    checks.check_no_sync("zipf")
