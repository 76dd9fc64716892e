"""The gate: right artifacts pass with what is known of their base, wrong ones are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loras import BASE, CONFIG, DTYPES, header_of, lora_files, safetensors, tensors, write_artifact

from hatrack.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from hatrack_server.adapters.safetensors_header import TensorHeader
from hatrack_server.catalog import Checked, check, gate
from hatrack_server.catalog.finite import CHUNK_BYTES, first_non_finite
from hatrack_server.errors import InvalidArtifact


def run(directory: Path, files: dict[str, bytes], *, max_rank: int = 64) -> Checked:
    return check(write_artifact(directory, files), BASE, max_rank=max_rank)


def field_of(directory: Path, files: dict[str, bytes]) -> str:
    with pytest.raises(InvalidArtifact) as caught:
        run(directory, files)
    assert str(directory) not in caught.value.message
    return caught.value.field


def test_a_plain_peft_artifact_is_unverified(tmp_path: Path) -> None:
    checked = run(tmp_path, lora_files())
    assert checked.trained_on is None
    assert len(gate.warnings(None, BASE.identity)) == 1
    assert checked.spec.rank == 2
    assert checked.spec.parameters == 2 * (2 * 4 + 6 * 2)
    assert checked.spec.resident_bytes == 2 * checked.spec.parameters  # in 16 bits
    assert checked.spec.tensors == {name: array.shape for name, array in tensors().items()}


def test_the_very_base_verifies(tmp_path: Path) -> None:
    checked = run(tmp_path, lora_files(manifest=BASE.identity))
    assert checked.trained_on == BASE.identity
    assert gate.warnings(BASE.identity, BASE.identity) == ()


@pytest.mark.parametrize("key", ["quantization", "tokenizer"])
def test_another_tokenizer_or_quantization_warns(tmp_path: Path, key: str) -> None:
    other = dataclasses.replace(BASE.identity, **{key: "none"})
    (warning,) = gate.warnings(run(tmp_path, lora_files(manifest=other)).trained_on, BASE.identity)
    assert key.replace("_", " ") in warning


@pytest.mark.parametrize("text", ["x" * 81, "\ud800"])
def test_a_digest_that_cannot_be_one_is_refused(tmp_path: Path, text: str) -> None:
    other = dataclasses.replace(BASE.identity, quantization=text)
    assert field_of(tmp_path, lora_files(manifest=other)) == "manifest.json: base.quantization"


@pytest.mark.parametrize("key", ["weights", "chat_template"])
def test_other_weights_and_another_template_are_refused(tmp_path: Path, key: str) -> None:
    other = dataclasses.replace(BASE.identity, **{key: "0" * 64})
    assert field_of(tmp_path, lora_files(manifest=other)) == f"manifest.json: base.{key}"


def test_a_manifest_of_other_content_is_refused(tmp_path: Path) -> None:
    files = {**lora_files(seed=1), MANIFEST_FILE: lora_files(seed=2, manifest=BASE.identity)[MANIFEST_FILE]}
    assert field_of(tmp_path, files) == "manifest.json: artifact"


@pytest.mark.parametrize("name", [CONFIG_FILE, MANIFEST_FILE])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"r": 2, "r": 3}', id="same key twice"),
        pytest.param(b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="deep"),
        pytest.param(b'{"lora_alpha": Infinity}', id="infinity"),
        pytest.param(b'{"r": ' + b"9" * 10_000 + b"}", id="endless number"),
        pytest.param(b"\x80", id="no text"),
        pytest.param(b" " * (1 << 20) + b"{}", id="large"),
    ],
)
def test_json_that_is_not_plain_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    assert field_of(tmp_path, {**lora_files(), name: content}) == name


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    artifact = write_artifact(tmp_path, lora_files())
    (tmp_path / name).unlink()
    with pytest.raises(InvalidArtifact) as caught:
        check(artifact, BASE, max_rank=64)
    assert caught.value.field == name


@pytest.mark.parametrize("peft_type", ["POLY", None, ["LORA"], "../lora"])
def test_other_methods_are_refused(tmp_path: Path, peft_type: Any) -> None:
    files = lora_files(config={**CONFIG, "peft_type": peft_type})
    assert field_of(tmp_path, files) == "adapter_config.json: peft_type"


# Bit patterns of NaN and of both infinities.
BAD_BITS = {
    "F32": ("<u4", [0x7FC00000, 0x7F800001, 0x7F800000, 0xFF800000]),
    "F16": ("<u2", [0x7E00, 0x7C01, 0x7C00, 0xFC00]),
    "BF16": ("<u2", [0x7FC0, 0x7F81, 0x7F80, 0xFF80]),
}
# The largest numbers, zero of both signs, the smallest subnormals.
GOOD_BITS = {
    "F32": [0x7F7FFFFF, 0xFF7FFFFF, 0, 0x80000000, 1],
    "F16": [0x7BFF, 0xFBFF, 0, 0x8000, 1],
    "BF16": [0x7F7F, 0xFF7F, 0, 0x8000, 1],
}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_numbers_must_be_finite_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    view, bad_bits = BAD_BITS[dtype]
    names = list(tensors())
    for bits in (*GOOD_BITS[dtype], *bad_bits):
        arrays = {name: np.zeros(array.shape, view) for name, array in tensors().items()}
        arrays[names[2]][-1, -1] = bits
        data = b"".join(array.tobytes() for array in arrays.values())
        files = {**lora_files(), WEIGHTS_FILE: safetensors(header_of(arrays, dtype), data)}
        if bits in bad_bits:
            assert field_of(tmp_path, files) == f"{WEIGHTS_FILE}: {names[2]}"
        else:
            run(tmp_path, files)


def test_the_finite_check_reads_beyond_the_first_chunk(tmp_path: Path) -> None:
    numbers = np.zeros(CHUNK_BYTES // 4 + 3, "<f4")
    header = {"x": TensorHeader("F32", numbers.shape, 5, 5 + numbers.nbytes)}
    (tmp_path / "file").write_bytes(b"12345" + numbers.tobytes())
    assert first_non_finite(tmp_path / "file", header) is None
    numbers[-1] = np.nan
    (tmp_path / "file").write_bytes(b"12345" + numbers.tobytes())
    assert first_non_finite(tmp_path / "file", header) == "x"


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    arrays = tensors()
    name = next(iter(arrays))
    arrays[name] = np.zeros((2, 5), "<f4")
    data = b"".join(array.tobytes() for array in arrays.values())
    files = {**lora_files(), WEIGHTS_FILE: safetensors(header_of(arrays), data)}
    assert field_of(tmp_path, files) == f"{WEIGHTS_FILE}: {name}"


def test_a_higher_rank_than_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="rank 2"):
        run(tmp_path, lora_files(), max_rank=1)


def test_the_gate_changes_nothing(tmp_path: Path) -> None:
    files = lora_files(manifest=BASE.identity)
    run(tmp_path, files)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert json.loads(files[CONFIG_FILE]) == CONFIG
