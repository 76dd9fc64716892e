"""Checks of the low-rank product's GPU kernels, which run where the caller is: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from hatrack_server.kernels.low_rank import add_low_rank_reference
from hatrack_server.kernels.runs import FixedRuns, Run, merge_runs, token_tiles

SHARED_BYTES = 99 * 1024  # what a program may have on any GPU since Ampere
ROWS, IN, OUT = 9, 200, 150  # neither is a multiple of what a program takes

# Each sequence's pool row, None for the base alone, and its number of tokens.
BATCHES: dict[str, list[tuple[int | None, int]]] = {
    "one token": [(8, 1)],
    "distinct": [(row, 1) for row in (4, 1, 8, 0)],
    "uniform": [(n % 2, 1) for n in range(5)],
    "zipf": [(row, 1 + n % 2) for n, row in enumerate(random.Random(0).choices(range(ROWS), [1, 0.5, 0.3] * 3, k=4))],
    "all same": [(4, 7)],
    "among the base": [(None, 3), (2, 1), (None, 1), (3, 1), (None, 2)],
    "short prompts": [(0, 5), (1, 33), (7, 16)],
    "a long prompt among decodes": [(3, 1), (5, 1), (None, 2), (1, 130), (7, 3), (1, 1)],
    "base alone": [(None, 3)],
    "no tokens": [(1, 0), (2, 2), (3, 0)],
}


def add_low_rank_cuda(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[Run]) -> None:
    """Imports Triton no earlier than in the process that runs the check."""
    from hatrack_server.kernels.triton_low_rank import add_low_rank_cuda

    add_low_rank_cuda(y, x, a, b, runs)


def check_batch(name: str, rank: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Against the reference in float32."""
    runs = _runs(BATCHES[name])
    y, x, a, b = _tensors(BATCHES[name], rank, dtype, device)
    wanted = y.float().clone()
    add_low_rank_reference(wanted, x.float(), a.float(), b.float(), runs)
    found = y.clone()
    add_low_rank_cuda(found, x, a, b, merge_runs(runs))
    _assert_close(found, wanted)


def check_long_batch(name: str, device: str = "cpu") -> None:
    """A batch of so many tiles that their input is not split, or one that is taken for it."""
    from hatrack_server.kernels import triton_low_rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_low_rank, "FEW_PROGRAMS", 0)
        check_batch(name, 8, torch.float32, device)


def check_fixed_runs(names: list[str], device: str = "cpu") -> None:
    """As a recorded graph has them: one table for each batch in turn, whose empty tiles change nothing."""
    table = torch.zeros(max(sum(count for _, count in BATCHES[name]) for name in names) + 3, 3, dtype=torch.int32)
    table = table.to(device)
    runs = FixedRuns(table)
    for name in names:
        y, x, a, b = _tensors(BATCHES[name], 8, torch.float32, device)
        table.copy_(token_tiles(merge_runs(_runs(BATCHES[name])), len(table)))
        wanted, found = y.clone(), y.clone()
        add_low_rank_reference(wanted, x, a, b, _runs(BATCHES[name]))
        if all(row != 0 for row, _ in BATCHES[name]):
            a[0] = math.nan  # the row that empty tiles name
        add_low_rank_cuda(found, x, a, b, runs)
        _assert_close(found, wanted)


def check_pools_of_another_dtype(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Layers in float32, pools not."""
    runs = _runs(BATCHES[name])
    y, x, a, b = _tensors(BATCHES[name], 8, torch.float32, device)
    wanted, found, a, b = y.clone(), y.clone(), a.to(dtype), b.to(dtype)
    add_low_rank_reference(wanted, x, a.float(), b.float(), runs)
    add_low_rank_cuda(found, x, a, b, runs)
    torch.testing.assert_close(found, wanted, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)


def check_input_that_is_the_output(name: str, device: str = "cpu") -> None:
    runs = _runs(BATCHES[name])
    x, _, a, _ = _tensors(BATCHES[name], 8, torch.float32, device)
    a, b = a[:, :, :OUT].contiguous(), a[:, :, -OUT:].contiguous()
    wanted, found = x.clone(), x.clone()
    add_low_rank_reference(wanted, x, a, b, runs)
    add_low_rank_cuda(found, found, a, b, runs)
    _assert_close(found, wanted)


def check_strided_tokens(name: str, device: str = "cpu") -> None:
    runs = _runs(BATCHES[name])
    y, x, a, b = _tensors(BATCHES[name], 8, torch.float32, device)
    wanted, found = y.clone(), y.t().contiguous().t()
    add_low_rank_cuda(wanted, x, a, b, runs)
    add_low_rank_cuda(found, torch.cat([x, x], dim=1)[:, :IN], a, b, runs)
    _assert_close(found, wanted)


def check_bad_adapter(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """The NaNs of a batch's first adapter stay with its tokens, bit by bit."""
    runs = _runs(BATCHES[name])
    y, x, a, b = _tensors(BATCHES[name], 8, dtype, device)
    wanted, found = y.clone(), y.clone()
    add_low_rank_cuda(wanted, x, a, b, runs)
    bad = runs[0].rows[0]
    a[bad], b[bad] = math.nan, math.inf
    add_low_rank_cuda(found, x, a, b, runs)
    theirs = torch.zeros(len(y), dtype=torch.bool, device=device)
    for run in runs:
        theirs[run.start : run.stop] = run.rows[0] == bad
    assert found[theirs].isnan().all()
    assert torch.equal(found[~theirs], wanted[~theirs])


def check_bad_token(name: str, device: str = "cpu") -> None:
    """A NaN in a sequence's first token touches no other token."""
    runs = _runs(BATCHES[name])
    y, x, a, b = _tensors(BATCHES[name], 8, torch.float32, device)
    wanted, found = y.clone(), y.clone()
    add_low_rank_cuda(wanted, x, a, b, runs)
    x[runs[0].start] = math.nan
    add_low_rank_cuda(found, x, a, b, runs)
    others = torch.arange(len(y), device=device) != runs[0].start
    assert found[~others].isnan().all()
    assert torch.equal(found[others], wanted[others])


def check_no_sync(name: str) -> None:
    """On a GPU: neither making tiles nor launching waits for it."""
    tensors = _tensors(BATCHES[name], 8, torch.bfloat16, "cuda")
    add_low_rank_cuda(*tensors, _runs(BATCHES[name]))  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_low_rank_cuda(*tensors, merge_runs(_runs(BATCHES[name])))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_compiles(name: str, rank: int, dtype: torch.dtype, capability: int) -> None:
    """For GPUs of one compute capability, none of which need be there."""
    from hatrack_server.kernels import triton_low_rank

    y, x, a, b = _tensors(BATCHES[name], rank, dtype, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        for kernel in ("_shrink", "_expand"):
            patch.setattr(triton_low_rank, kernel, _Compiled(getattr(triton_low_rank, kernel), capability))
        add_low_rank_cuda(y, x, a, b, _runs(BATCHES[name]))


class _Compiled:
    """Stands for a kernel and compiles what is launched, specialised as Triton does it."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel = kernel
        self.capability = capability

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        names = self.kernel.arg_names
        options = {key: kwargs.pop(key) for key in list(kwargs) if key not in names}
        values = dict(zip(names, args, strict=False)) | kwargs
        types = {key: "constexpr" if key in kwargs else _type(value) for key, value in values.items()}
        constants = {key: value for key, value in values.items() if types[key] == "constexpr"}
        even = {
            (names.index(key),): [["tt.divisibility", 16]]
            for key, value in values.items()
            if isinstance(value, Tensor) or (key not in constants and key != "tokens" and value % 16 == 0)
        }
        source = triton.compiler.ASTSource(self.kernel, types, constants, even)
        compiled = triton.compile(source, GPUTarget("cuda", self.capability, 32), options)
        assert compiled.metadata.shared <= SHARED_BYTES


def _type(value: Tensor | int) -> str:
    if isinstance(value, int):
        return "constexpr" if value == 1 else "i32"
    return {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}[value.dtype]


def _runs(batch: list[tuple[int | None, int]]) -> list[Run]:
    starts = itertools.accumulate((tokens for _, tokens in batch), initial=0)
    return [Run(start, n, (row,)) for start, (row, n) in zip(starts, batch, strict=False) if row is not None]


def _tensors(
    batch: list[tuple[int | None, int]], rank: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x, a, b, such that what is added is about as large as y."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(n for _, n in batch)
    y, x = (torch.randn(tokens, n, generator=generator) for n in (OUT, IN))
    a = torch.randn(ROWS, rank, IN, generator=generator) / IN**0.5
    b = torch.randn(ROWS, rank, OUT, generator=generator) / rank**0.5
    y, x, a, b = (tensor.to(device, dtype) for tensor in (y, x, a, b))
    return y, x, a, b


def _assert_close(found: Tensor, wanted: Tensor) -> None:
    tolerance = 8 * torch.finfo(found.dtype).eps if found.dtype is not torch.float32 else 1e-5
    torch.testing.assert_close(found.float(), wanted, atol=tolerance, rtol=tolerance)
