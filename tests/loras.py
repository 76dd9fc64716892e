"""Small LoRA artifacts written by hand: no torch, so that any byte of them can be made wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hatrack.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    BaseIdentity,
    Manifest,
    artifact_digest,
    file_sha256,
)
from hatrack_server.catalog import Catalog, Checked, DeclaredFile, Upload
from hatrack_server.types import Artifact, BaseInfo, BaseShapes, LinearShape, ProgramSpec

BASE = BaseInfo(
    identity=BaseIdentity(weights="w" * 64, quantization="nf4-double-64", tokenizer="t" * 64, chat_template="c" * 64),
    architecture="LlamaForCausalLM",
    shapes=BaseShapes(
        linears={
            f"model.layers.{layer}.self_attn.{name}": LinearShape(out_features=6, in_features=4)
            for layer in range(2)
            for name in ("q_proj", "v_proj")
        },
        embedding="model.embed_tokens",
        width=4,
        attention=(),
    ),
    vocab_size=320,
    max_model_len=512,
    kv_tokens=4096,
    eos_token_ids=frozenset({257}),
    memory={},
    adapter_bytes=10**9,
    device="cpu",
)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
CHECKED = Checked(ProgramSpec("LORA", 2, 40, 160, {}), BASE.identity)
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def tensors(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A and B of both q_proj of BASE, rank 2."""
    generator = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers"
    shapes = {"lora_A": (2, 4), "lora_B": (6, 2)}
    return {
        f"{prefix}.{layer}.self_attn.q_proj.{part}.weight": generator.standard_normal(shape).astype("<f4")
        for layer in range(2)
        for part, shape in shapes.items()
    }


def header_of(arrays: Mapping[str, np.ndarray[Any, Any]], dtype: str = "F32") -> dict[str, Any]:
    """The entries of a right safetensors header."""
    entries, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    return entries


def safetensors(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A file's bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def lora_files(
    *, seed: int = 0, config: dict[str, Any] | None = None, manifest: BaseIdentity | None = None
) -> dict[str, bytes]:
    """The files of a right artifact on BASE by name; `manifest` is the base that its manifest names."""
    arrays = tensors(seed)
    weights = safetensors(header_of(arrays), b"".join(array.tobytes() for array in arrays.values()))
    files = {CONFIG_FILE: json.dumps(CONFIG if config is None else config).encode(), WEIGHTS_FILE: weights}
    if manifest is not None:
        files[MANIFEST_FILE] = Manifest(digest_of(files), manifest, "LORA").to_json().encode()
    return files


def digest_of(files: Mapping[str, bytes]) -> str:
    """The artifact's digest."""
    return artifact_digest({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def write_artifact(directory: Path, files: Mapping[str, bytes]) -> Artifact:
    """Puts `files` into `directory`, as an upload does."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return Artifact(digest_of(files), directory)


def declared(files: Mapping[str, bytes]) -> list[DeclaredFile]:
    """What a right upload header says of `files`."""
    return [DeclaredFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]


def upload(
    catalog: Catalog, name: str, files: Mapping[str, bytes], *, tenant: str = "default", stage: bool = False
) -> Upload:
    """An upload of `files`, finished and not yet committed."""
    begun = catalog.begin_upload(tenant, name, declared(files), stage=stage)
    begun.write(b"".join(files.values()))
    begun.finish()
    return begun


def stored_digests(data_dir: Path) -> set[str]:
    """What lies in the store, each with its own bytes; nothing may be staged."""
    assert not list((data_dir / "staging").iterdir())
    for path in (data_dir / "artifacts").iterdir():
        assert artifact_digest({file.name: file_sha256(file) for file in path.iterdir()}) == path.name
    return {path.name for path in (data_dir / "artifacts").iterdir()}
