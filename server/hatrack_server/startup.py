"""What an operator sees while the base loads, and once it has: on stderr, so that stdout stays machine readable."""

from __future__ import annotations

from collections.abc import Awaitable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hatrack_server.types import BaseInfo


class LoadingProgress:
    """How far the loading is; shows nothing where the console is no terminal, and is harmless to update later."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("starting", total=1.0)

    def update(self, stage: str, fraction: float) -> None:
        """Shows how far a stage is, from 0 to 1."""
        self._progress.update(self._task, description=stage, completed=fraction)

    async def follow(self, loading: Awaitable[BaseInfo]) -> BaseInfo:
        """Shows the bar until the base is loaded, then where its memory went; raises what `loading` raises."""
        with self._progress:
            base = await loading
        if self._progress.console.is_terminal:
            self._progress.console.print(base_table(base))
        return base


def base_table(base: BaseInfo) -> Table:
    """What the loaded base is, and where its memory goes."""
    table = Table(title=f"{base.architecture} on {base.device}", title_justify="left")
    table.add_column("memory")
    table.add_column("MB", justify="right")
    for purpose, size in base.memory.items():
        table.add_row(purpose, f"{size / 1e6:,.1f}")
    table.caption = (
        f"context {base.max_model_len:,} tokens · KV cache {base.kv_tokens:,} tokens · {base.identity.quantization}"
    )
    return table
