"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from hatrack_client._upload import Progress as OnProgress


@contextmanager
def upload_progress(name: str) -> Iterator[OnProgress]:
    """Shows how much of `name` has been sent while the block runs; silent where nobody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)
