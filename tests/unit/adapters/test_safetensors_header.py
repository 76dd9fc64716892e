"""The header's reader: what safetensors itself writes passes, and every kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loras import header_of, safetensors, tensors
from safetensors.numpy import save_file

from hatrack_server.adapters.safetensors_header import MAX_HEADER_BYTES, read_header
from hatrack_server.errors import InvalidArtifact

A, B = "a", "b"


def entry(start: int, stop: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop], **changes}


def field_of(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidArtifact) as caught:
        read_header(tmp_path / "file")
    assert str(tmp_path) not in caught.value.message
    return caught.value.field


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    arrays = {**tensors(), "half": np.zeros((3, 1), "<f2")}
    save_file(arrays, tmp_path / "file", metadata={"format": "pt"})
    headers = read_header(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert {name: header.shape for name, header in headers.items()} == {k: v.shape for k, v in arrays.items()}
    for name, header in headers.items():
        assert content[header.start : header.stop] == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({A: entry(0, 8), B: entry(4, 12)}, 12, id="overlap"),
        pytest.param({A: entry(0, 8), B: entry(12, 16)}, 16, id="hole"),
        pytest.param({A: entry(0, 8), B: entry(0, 8)}, 8, id="shared"),
        pytest.param({A: entry(0, 4), B: entry(4, 12, shape=[3])}, 12, id="mis-sized"),
        pytest.param({A: entry(0, 4), B: entry(4, 12, dtype="I64", shape=[1])}, 12, id="integers"),
        pytest.param({A: entry(0, 4), B: entry(4, 12, dtype=["F32"])}, 12, id="dtype not text"),
        pytest.param({A: entry(0, 4), B: entry(4, 12, shape=[-1, -2])}, 12, id="negative"),
        pytest.param({A: entry(0, 4), B: entry(4, 12, shape=[True, 2])}, 12, id="boolean"),
        pytest.param({A: entry(0, 4), B: entry(4, 12, shape=[1] * 8 + [2])}, 12, id="many dimensions"),
        pytest.param({A: entry(0, 4), B: entry(4, 12, extra=1)}, 12, id="unknown key"),
        pytest.param({A: entry(0, 4), B: entry(12, 4, shape=[0])}, 12, id="backwards"),
        pytest.param({A: entry(0, 4), B: [1]}, 12, id="no object"),
    ],
)
def test_names_the_tensor(tmp_path: Path, header: dict[str, Any], data: int) -> None:
    assert field_of(tmp_path, safetensors(header, bytes(data))) == "adapter_model.safetensors: b"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 4, id="no length"),
        pytest.param((1 << 40).to_bytes(8, "little") + b"{}", id="length beyond the file"),
        pytest.param(safetensors({A: entry(0, 8)}, bytes(4)), id="truncated"),
        pytest.param(safetensors({A: entry(0, 8)}, bytes(12)), id="trailing"),
        pytest.param(safetensors(b" " * (MAX_HEADER_BYTES + 1), b""), id="huge header"),
        pytest.param(safetensors(b"[]", b""), id="no object"),
        pytest.param(safetensors(b"\xff\xfe", b""), id="no text"),
        pytest.param(safetensors(b"[" * 100_000, b""), id="deep"),
        pytest.param(safetensors(b'{"a":1,"a":1}', b""), id="same name twice"),
        pytest.param(safetensors(b'{"a":NaN}', b""), id="NaN"),
    ],
)
def test_names_the_file(tmp_path: Path, content: bytes) -> None:
    assert field_of(tmp_path, content) == "adapter_model.safetensors"


def test_bytes_may_come_in_any_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(safetensors(json.dumps({B: entry(4, 8), A: entry(0, 4)}).encode(), bytes(8)))
    assert list(read_header(tmp_path / "file")) == [A, B]


def test_a_right_header_by_hand(tmp_path: Path) -> None:
    arrays = tensors()
    data = b"".join(array.tobytes() for array in arrays.values())
    (tmp_path / "file").write_bytes(safetensors(header_of(arrays), data))
    assert list(read_header(tmp_path / "file")) == list(arrays)
