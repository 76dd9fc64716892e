"""The header of a safetensors file, read by hand: what the file says it holds, before any tensor is touched.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without holes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hatrack.manifest import WEIGHTS_FILE
from hatrack_server.adapters.strict_json import parse_object
from hatrack_server.errors import InvalidArtifact

MAX_HEADER_BYTES = 4 << 20  # an all-linear LoRA of a 70B model needs 170 KiB
MAX_DIMENSIONS = 8
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as the header tells it; its bytes are `file[start:stop]`."""

    dtype: str  # a key of ITEM_SIZES
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes."""
        return self.elements * ITEM_SIZES[self.dtype]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of `path` by name, in the order of their bytes.

    Raises InvalidArtifact naming the file or the tensor when the header is malformed or too large, a dtype is not
    F32, F16 or BF16, or the tensors' bytes overlap, leave holes, or don't end where the file ends.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file, size)
        try:
            entries = parse_object(file.read(length))
        except ValueError as error:
            raise InvalidArtifact(WEIGHTS_FILE, f"the header is malformed: {error}") from None
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, 8 + length) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_layout(ordered, 8 + length, size)
    return ordered


def _header_length(file: BinaryIO, size: int) -> int:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise InvalidArtifact(WEIGHTS_FILE, "the file is truncated, or not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise InvalidArtifact(WEIGHTS_FILE, f"the header has {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return length


def _tensor(name: str, entry: Any, data_start: int) -> TensorHeader:
    field = f"{WEIGHTS_FILE}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidArtifact(field, "must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise InvalidArtifact(field, f"dtype must be one of {', '.join(ITEM_SIZES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise InvalidArtifact(field, f"shape must be a list of at most {MAX_DIMENSIONS} natural numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise InvalidArtifact(field, "data_offsets must be two natural numbers")
    tensor = TensorHeader(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    held = tensor.stop - tensor.start
    if held != tensor.nbytes:
        raise InvalidArtifact(field, f"data_offsets hold {held} bytes, shape and dtype need {tensor.nbytes}")
    return tensor


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(ordered: dict[str, TensorHeader], data_start: int, size: int) -> None:
    end = data_start
    for name, tensor in ordered.items():
        if tensor.start != end:
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {name}", "its bytes overlap another tensor's or leave a hole")
        end = tensor.stop
    if end != size:
        raise InvalidArtifact(WEIGHTS_FILE, f"the tensors end at byte {end}, the file at byte {size}")
