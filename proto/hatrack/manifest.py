"""The artifact contract: which files make an adapter, its digest, and the manifest beside it.

An artifact is `adapter_config.json` and `adapter_model.safetensors` in PEFT's own format. Its identity is its digest.
`manifest.json` is optional and stands outside the digest, which it names. Plain standard library: client, server and
trainer all import this.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
ARTIFACT_FILES = (CONFIG_FILE, WEIGHTS_FILE)
MANIFEST_VERSION = 1


def file_sha256(path: Path) -> str:
    """The lower-case hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_digest(sha256_by_file: dict[str, str]) -> str:
    """The artifact's digest: sha256 over one line `sha256  name` for each of ARTIFACT_FILES, in that order.

    Raises KeyError when one of the two is missing from `sha256_by_file`; other files don't count.
    """
    lines = "".join(f"{sha256_by_file[name]}  {name}\n" for name in ARTIFACT_FILES)
    return hashlib.sha256(lines.encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """The digest of the artifact in a folder; raises OSError when a file can't be read."""
    return artifact_digest({name: file_sha256(folder / name) for name in ARTIFACT_FILES})


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The four digests of a base, lower-case hexadecimal; two bases are the same when all four are."""

    weights: str  # over the names and bytes of the checkpoint's weight files
    quantization: str  # readable: "nf4-double-64" or "none"
    tokenizer: str  # over tokenizer.json
    chat_template: str  # over the template's text; "" without one


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json`: which base an artifact was made for, and how."""

    artifact: str  # the artifact's digest
    base: BaseIdentity
    method: str  # as PEFT spells it, e.g. "LORA"
    training: dict[str, Any] = field(default_factory=dict)  # a free record: library versions, data, steps, loss
    version: int = MANIFEST_VERSION

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads a manifest; raises ValueError with a sentence naming the key that is wrong."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("base"), dict):
            raise ValueError("base: missing or not an object")
        if raw.get("version") != MANIFEST_VERSION:
            raise ValueError(f"version: must be {MANIFEST_VERSION}")
        digests = ("weights", "quantization", "tokenizer", "chat_template")
        base = {key: _text(raw["base"], key, "base.") for key in digests}
        training = raw.get("training", {})
        if not isinstance(training, dict):
            raise ValueError("training: must be an object")
        return cls(_text(raw, "artifact"), BaseIdentity(**base), _text(raw, "method"), training)


def _text(raw: dict[str, Any], key: str, prefix: str = "") -> str:
    value = raw.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{prefix}{key}: missing or not text")
    return value
