"""What the control groups of this process leave it of memory: a container's limit, which the machine's own hide.

Linux' Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Limit, use, and what of the use is the cache of files, which is given up when memory is asked for.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that every group of this process leaves; None where none has a limit. `root` is the file system's."""
    try:
        left = [_left(group, names) for group, names in _groups(root)]
    except OSError:  # no Linux, or no /proc
        return None
    return min((size for size in left if size is not None), default=None)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The groups and all above them. In a container those above the mounted one are not there, though named."""
    mounted = root / "sys/fs/cgroup"
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            top, names = (mounted / "memory", V1) if controllers else (mounted, V2)
            group = top / path.strip("/")
            for each in (group, *group.parents):
                yield each, names
                if each == top:
                    break


def _left(group: Path, names: tuple[str, str, str]) -> int | None:
    limit, used, cache = names
    try:
        figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int((group / limit).read_text()) - int((group / used).read_text()) + int(figures[cache])
    except (OSError, ValueError, KeyError):  # not there, or its limit is "max"
        return None
