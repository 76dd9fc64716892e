from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hatrack_server.kernels import native as module
from hatrack_server.kernels.low_rank import BatchLowRank, add_low_rank_reference
from hatrack_server.kernels.native import Native
from hatrack_server.kernels.runs import Run, merge_runs

ROWS = 9
SKEWS = {
    "distinct": list(range(ROWS)),
    "uniform": [n % 3 for n in range(12)],
    "zipf": random.Random(0).choices(range(ROWS), [1 / (n + 1) for n in range(ROWS)], k=17),
    "all same": [4] * 11,
    "single": [8],
    "none": [],
}


def halves(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# The second has more outputs than a thread makes at a time, and none of its sizes fills whole vectors. The last two
# have just as many ranks as are summed up together, and more.
@pytest.mark.parametrize(("rank", "width", "out"), [(8, 64, 32), (3, 77, 1111), (1, 1, 1), (16, 64, 96), (40, 32, 300)])
@pytest.mark.parametrize("skew", SKEWS)
def test_low_rank_equals_its_reference(library: Native, skew: str, rank: int, width: int, out: int) -> None:
    rows = SKEWS[skew]
    a, b = halves(ROWS, rank, width), halves(ROWS, rank, out, seed=1)
    x, y = halves(len(rows), width, seed=2), halves(len(rows), out, seed=3)
    wanted = y.float()
    runs = [Run(0, 1, tuple(rows))]
    add_low_rank_reference(wanted, x.float(), a.float(), b.float(), runs)
    library.low_rank_sums(a, b, runs)(y, x)
    torch.testing.assert_close(y.float(), wanted, rtol=2**-8, atol=1e-4 * width)  # one rounding of the sum


@pytest.mark.parametrize("length", [2, 4, 7])
@pytest.mark.parametrize(("rank", "width", "out"), [(8, 64, 32), (6, 77, 300), (16, 32, 96), (33, 32, 50)])
def test_low_rank_of_several_tokens_to_a_row(library: Native, rank: int, width: int, out: int, length: int) -> None:
    runs = [Run(1, length, (4, 0, 7)), Run(2 + 3 * length, 1, (4, 4)), Run(4 + 3 * length, 2 * length, (1,))]
    tokens = runs[-1].stop
    a, b = halves(ROWS, rank, width), halves(ROWS, rank, out, seed=1)
    x, y = halves(tokens + 1, width, seed=2), halves(tokens + 2, out, seed=3)[1:]
    wanted = y.float()
    add_low_rank_reference(wanted, x.float(), a.float(), b.float(), runs)
    library.low_rank_sums(a, b, runs)(y, x)
    torch.testing.assert_close(y.float(), wanted, rtol=2**-8, atol=1e-4 * width)


@pytest.mark.usefixtures("two_threads")
def test_low_rank_threads_wait_for_each_other(library: Native) -> None:
    """Three groups of ranks and three strips of outputs: the thread with less to do of either is the same."""
    a, b, y = halves(1, 12, 8192), halves(1, 12, 600, seed=1), torch.zeros(1, 600, dtype=torch.bfloat16)
    add = library.low_rank_sums(a, b, [Run(0, 1, (0,))])
    for n in range(20):
        x = halves(1, 8192, seed=2) * (1 + n % 2)  # so that what the last call has left is wrong
        wanted = torch.zeros(1, 600)
        add_low_rank_reference(wanted, x.float(), a.float(), b.float(), [Run(0, 1, (0,))])
        add(y.zero_(), x)
        torch.testing.assert_close(y.float(), wanted, rtol=2**-7, atol=1.0)


def test_low_rank_on_its_own_output(library: Native) -> None:
    a, b, y = halves(2, 8, 40), halves(2, 8, 40, seed=1), halves(3, 40, seed=2)
    other = y.clone()
    add = library.low_rank_sums(a, b, [Run(0, 1, (0, 1, 1))])
    add(other, y)
    add(y, y)
    assert torch.equal(y, other)


def test_low_rank_between_other_tokens(library: Native) -> None:
    """Tokens of wider tensors, and from the second on."""
    a, b, x, y = halves(2, 8, 24), halves(2, 8, 24, seed=1), halves(5, 48, seed=2), halves(5, 48, seed=3)
    wanted = y[1:3, :24].clone()
    before = y.clone()
    library.low_rank_sums(a, b, [Run(0, 1, (1, 0))])(wanted, x[1:3, :24].contiguous())
    library.low_rank_sums(a, b, [Run(1, 1, (1, 0))])(y[:, :24], x[:, :24])
    assert torch.equal(y[1:3, :24], wanted)
    y[1:3, :24] = before[1:3, :24]
    assert torch.equal(y, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_adapter_stays_with_its_tokens(library: Native, value: float) -> None:
    a, b, x, y = halves(3, 8, 40), halves(3, 8, 600, seed=1), halves(3, 40, seed=2), halves(3, 600, seed=3)
    wanted, found = y.clone(), y.clone()
    add = library.low_rank_sums(a, b, [Run(0, 1, (0, 1, 2))])
    add(wanted, x)
    a[1] = value
    add(found, x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("lengths", [(1,), (16,), (17,), (65,), (1, 70, 2)], ids=str)
def test_a_step_of_decodes_and_prompts_in_bfloat16(lengths: tuple[int, ...]) -> None:
    """Runs of few tokens and of many, which take different ways."""
    a, b = halves(ROWS, 16, 64) / 8, halves(ROWS, 16, 96, seed=1) / 8
    parts, start = [], 0
    for n in range(7):
        parts.append(Run(start, lengths[n % len(lengths)], (n * 5 % ROWS,)))
        start = parts[-1].stop
    x, y = halves(start, 64, seed=2), halves(start, 96, seed=3)
    wanted = y.float()
    add_low_rank_reference(wanted, x.float(), a.float(), b.float(), parts)
    BatchLowRank(a, b, merge_runs(parts))(y, x)
    torch.testing.assert_close(y.float(), wanted, rtol=2**-7, atol=5e-2)


def test_operands_that_dont_fit_are_refused(library: Native) -> None:
    a, b, x, y = halves(2, 8, 24), halves(2, 8, 40), halves(3, 24), halves(3, 40)
    run = Run(0, 1, (0, 1, 0))

    def apply(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *runs: Run) -> None:
        library.low_rank_sums(a, b, runs)(y, x)

    for wrong in (
        (y, x[:, :20], a, b),
        (y[:, :39], x, a, b),
        (y[:2], x, a, b),
        (y, x, a, b[:, :4]),
        (y, x.T.contiguous().T, a, b),
        (y, x, halves(2, 8, 48)[:, :, ::2], b),
        (y, x, a.float(), b),
        (y, x, a, b.float()),
    ):
        with pytest.raises(ValueError, match="fit"):
            apply(*wrong, run)
    for wrong_run in (replace(run, start=-1), replace(run, start=1), replace(run, length=2)):
        with pytest.raises(ValueError, match="fit"):
            apply(y, x, a, b, run, wrong_run)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_callers_go_on_without(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "COMPILER", compiler)
    with caplog.at_level(logging.WARNING):
        assert module.native.__wrapped__() is None
    assert "no C kernels" in caplog.text


def test_what_the_compiler_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kernel.c").write_text("#error not this one\n")
    monkeypatch.setattr(module, "HERE", tmp_path)
    assert module.native.__wrapped__() is None
    assert "not this one" in caplog.text
