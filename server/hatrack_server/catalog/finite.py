"""Whether a file's numbers are finite, read in chunks: an upload may be larger than the memory to spare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hatrack_server.adapters.safetensors_header import TensorHeader

CHUNK_BYTES = 4 << 20  # a multiple of every item size

# A float is NaN or infinite when every bit of its exponent is set: (integer view, exponent mask) by dtype.
_EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}


def first_non_finite(path: Path, headers: Mapping[str, TensorHeader]) -> str | None:
    """The name of a tensor of the safetensors file `path` that holds NaN or infinity, or None."""
    with path.open("rb") as file:
        return next((name for name, header in headers.items() if not _is_finite(file, header)), None)


def _is_finite(file: BinaryIO, header: TensorHeader) -> bool:
    view, mask = _EXPONENTS[header.dtype]
    file.seek(header.start)
    for offset in range(0, header.nbytes, CHUNK_BYTES):
        bits = np.frombuffer(file.read(min(CHUNK_BYTES, header.nbytes - offset)), dtype=view)
        if np.any((bits & view.type(mask)) == mask):
            return False
    return True
