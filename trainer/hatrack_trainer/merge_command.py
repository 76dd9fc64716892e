"""`hatrack adapters merge`. Importing this costs nothing: what needs torch is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from hatrack_trainer.commands import check_base_option, reporting_errors
from hatrack_trainer.wording import printable

INTO = (
    "dequantized: the NF4 weights that QLoRA adapters learn and are served on; answers are the server's to a rounding. "
    "original: the checkpoint's own; answers may be a bit better or worse. To quantise the result anew, take original."
)


def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder in PEFT's format.", show_default=False)],
    into: Annotated[Literal["original", "dequantized"], typer.Option(help=INTO)],
    base: Annotated[str, typer.Option(help="The base: a checkpoint's folder, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint's folder; must not exist yet, or be empty.")],
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="What it is saved in.")] = "bfloat16",
) -> None:
    """Merge an adapter into its base, as a checkpoint for transformers alone; takes 4 bytes of memory per weight."""
    with reporting_errors():
        check_base_option(base)
        console = Console(stderr=True)
        with console.status("importing torch"):
            from hatrack_trainer.merge import MEANING
            from hatrack_trainer.merge import merge as merge_adapter
        merged = merge_adapter(
            folder,
            base=base,
            into=into,
            out=out,
            precision=dtype,
            say=lambda doubt: typer.echo(f"hatrack: warning: {doubt}", err=True),
        )
        adapter = merged.adapter
        done = f"{out}: {adapter.method} adapter {adapter.digest} merged into {merged.base}: {MEANING[into]}"
        typer.echo(printable(done))
