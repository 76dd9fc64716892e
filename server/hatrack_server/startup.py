"""What an operator sees while the base loads, and once it has: on stderr, so that stdout stays machine readable."""

from __future__ import annotations

from collections.abc import Awaitable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hatrack_server.types import BaseInfo

COMMON_RANK = 16


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
    table = Table(title=f"{base.architecture} on {base.device}", title_justify="left", show_footer=True)
    table.add_column("memory", "sum")
    table.add_column("MB", _megabytes(sum(base.memory.values())), justify="right")
    table.add_column("")
    notes = _notes(base)
    for purpose, size in base.memory.items():
        table.add_row(purpose, _megabytes(size), notes.get(purpose))
    table.caption = f"context {base.max_model_len:,} tokens · {base.identity.quantization}"
    return table


def bits_per_weight(base: BaseInfo) -> float | None:
    """What an NF4 weight takes, scales included, measured on the loaded base; None where nothing is quantised."""
    # A linear layer that may be replaced is the output head, in 16 bits.
    quantised = [shape for name, shape in base.shapes.linears.items() if name not in base.shapes.replaceable]
    weights = sum(shape.in_features * shape.out_features for shape in quantised)
    return 8 * base.memory["NF4 weights"] / weights if base.memory.get("NF4 weights") else None


def lora_bytes(base: BaseInfo, rank: int) -> int:
    """What a LoRA program of this rank on every linear layer but the head takes, on a base that computes in 16 bits."""
    adapted = (shape for name, shape in base.shapes.linears.items() if name != base.shapes.head)
    return 2 * rank * sum(shape.in_features + shape.out_features for shape in adapted)


def _notes(base: BaseInfo) -> dict[str, str]:
    bits = bits_per_weight(base)
    return {
        "NF4 weights": f"{bits:.2f} bits per weight" if bits else "",
        "KV cache": f"{base.kv_tokens:,} tokens",
        "adapters, at most": f"{base.adapter_bytes // lora_bytes(base, COMMON_RANK):,} LoRAs of rank {COMMON_RANK}",
        "evicted adapters, at most": "on the host",
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
