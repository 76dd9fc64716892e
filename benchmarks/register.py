"""Registers many adapters that differ, without keeping more than one copy of them on the disk."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

from traffic import closed_loop

from hatrack_client import AsyncClient

PUSHING = 4  # at once
DENORMAL = 0x7F  # the greatest 16 bits that any float format reads as a tiny number: no infinity, no NaN


async def register(client: AsyncClient, template: Path, names: Sequence[str]) -> None:
    """Pushes a copy of `template` under each name that the server does not know yet; no two have the same content."""
    known = {adapter.name async for adapter in client.list_adapters(page_size=1000)}

    async def push(number: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            await client.push_adapter(names[number], make_copy(template, Path(folder), number))
        return []

    await closed_loop([number for number, name in enumerate(names) if name not in known], PUSHING, push)


def make_copy(template: Path, folder: Path, number: int) -> Path:
    """The adapter with its last three values changed to say `number`, below 2**21; they stay finite. Returns `folder`.

    The server tells contents by their digest: equal copies would be one program.
    """
    shutil.copytree(template, folder, dirs_exist_ok=True)
    values = struct.pack("<3H", *(number >> shift & DENORMAL for shift in (0, 7, 14)))
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-len(values), 2)
        file.write(values)
    return folder
