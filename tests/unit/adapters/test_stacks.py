from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest
import torch

from hatrack_server.adapters.stacks import ReservedRows

KILOBYTES = 256  # a row's


def rows(count: int) -> ReservedRows:
    return ReservedRows.of((KILOBYTES, 256), torch.float32).grown(0, 1, count)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_growing_leaves_the_rows_where_they_are() -> None:
    stack = rows(8)
    held = stack.rows
    held[0] = 1.0
    assert stack.grown(1, 8, 8).rows is held


def test_more_rows_than_were_reserved_are_a_copy_that_readers_of_the_old_do_not_notice() -> None:
    stack = rows(2)
    held = stack.rows
    held[:2] = torch.tensor([1.0, 2.0])[:, None, None]
    stack = stack.grown(2, 3, 0)
    assert len(stack.rows) == 4  # twice as many, so that copies stay few
    assert [row.unique().tolist() for row in stack.rows[:2]] == [[1.0], [2.0]]
    stack.rows[0] = 7.0
    assert held[0].unique().tolist() == [1.0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_taken_by_what_was_written_and_given_back() -> None:
    before = resident_bytes()
    stack = rows(4000)  # a gigabyte
    assert resident_bytes() - before < 50_000_000
    stack.rows[:400] = 1.0
    assert resident_bytes() - before > 90_000_000
    stack = stack.trimmed(2)
    assert resident_bytes() - before < 50_000_000
    assert stack.rows[:2].unique().tolist() == [1.0]


def test_a_page_that_a_kept_row_shares_stays() -> None:
    stack = ReservedRows.of((3,), torch.float32).grown(0, 5000, 0)
    stack.rows[:] = 1.0
    stack = stack.trimmed(7)
    assert stack.rows[:7].unique().tolist() == [1.0]
    assert stack.rows[-1].tolist() == [0.0] * 3


class PlainMemory(mmap.mmap):
    """As a kernel without transparent huge pages gives it."""

    def madvise(self, option: int, start: int = 0, length: int | None = None) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


def test_huge_pages_need_not_be_known_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", PlainMemory)
    assert len(rows(8).rows) == 8


def test_more_addresses_than_there_are_make_no_row_fail() -> None:
    stack = rows(2**40)
    stack.rows[0] = 1.0
    stack = stack.grown(1, 2, 2**40)
    assert stack.rows.shape == (2, KILOBYTES, 256)
    assert stack.rows[0].unique().tolist() == [1.0]
