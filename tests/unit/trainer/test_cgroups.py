"""Of the files that Linux shows, written as a container sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hatrack_trainer.estimate.cgroups import memory_left
from hatrack_trainer.estimate.memory import available_memory

UNLIMITED = 9223372036854771712


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def v2(group: str, limit: object, used: int, cache: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cache}",
    }


def v1(group: str, limit: int, used: int, cache: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 0\ntotal_inactive_file {cache}",
    }


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/", v2("", 1000, 700, 200), 500),
        ("0::/", v2("", "max", 700, 200), None),
        ("0::/", {}, None),
        ("0::/a/b", v2("/a/b", 1000, 700, 0) | v2("/a", 900, 800, 0) | v2("", "max", 900, 0), 100),
        ("4:memory:/docker/c\n1:cpu:/\n0::/", v1("", 1000, 700, 200), 500),  # only its own group is mounted
        ("4:cpu,memory:/", v1("", UNLIMITED, 700, 200), UNLIMITED - 500),
        ("1:cpu:/", v1("", 1000, 700, 200), None),
    ],
)
def test_the_tightest_group_counts(tmp_path: Path, groups: str, files: dict[str, object], left: int | None) -> None:
    assert memory_left(write(tmp_path, {"proc/self/cgroup": groups} | files)) == left


def test_elsewhere_there_are_none(tmp_path: Path) -> None:
    assert memory_left(tmp_path) is None


def test_no_more_is_free_than_they_leave() -> None:
    assert 0 < available_memory(cuda=False) <= (memory_left() or UNLIMITED) + 2**30
