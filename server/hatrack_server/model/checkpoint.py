"""Finding and reading a checkpoint's files, and saying which base they are. No torch: the front process needs it."""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hatrack.manifest import BaseIdentity, file_sha256
from hatrack_server.errors import HatrackError, StartupError

TEXT_PATTERNS = ("*.json", "*.jinja")
FILE_PATTERNS = ("*.safetensors", *TEXT_PATTERNS)


def resolve_checkpoint(path_or_id: str, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded into the hub's own cache first.

    Without `weights`, only its configuration must be there, and of a hub id no weights are downloaded. Raises
    StartupError, in one sentence, when there is no such checkpoint or a file is missing.
    """
    path = Path(path_or_id)
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib raises at a name that is too long
        path = _download(path_or_id, FILE_PATTERNS if weights else TEXT_PATTERNS)
    for name in ("config.json", "tokenizer.json") if weights else ("config.json",):
        if not (path / name).is_file():
            raise StartupError(f"model {path_or_id} has no {name}")
    if weights and not any(path.glob("*.safetensors")):
        raise StartupError(f"model {path_or_id} has no *.safetensors weights")
    return path


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if hub_id.startswith(("/", ".", "~")) or hub_id.count("/") > 1:
        raise StartupError(f"model path {hub_id} does not exist")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        raise StartupError(f"model {hub_id} is neither a folder nor a hub id that can be downloaded") from None


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turns whatever a library raises at a broken file or checkpoint into a StartupError that names it, in one line."""
    try:
        yield
    except HatrackError:
        raise
    except Exception as error:
        raise StartupError(f"{path} can't be loaded: {_reason(error)}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; raises StartupError, naming it, where there is none."""
    with loading(file):
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    return content


def read_text_config(checkpoint: Path) -> dict[str, Any]:
    """What config.json says of the model that reads and writes text, which may be a part of a larger one."""
    config = read_json(checkpoint / "config.json")
    text = config.get("text_config")
    return config | text if isinstance(text, dict) else config


def eos_token_ids(checkpoint: Path) -> list[int]:
    """The ids that end a completion; from generation_config.json, where chat models keep several, or else config.json.
    Empty where neither names one.

    Raises StartupError, naming the file, for what is no id of the vocabulary.
    """
    config = read_text_config(checkpoint)
    file = checkpoint / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else None
    if found is None:
        file, found = checkpoint / "config.json", config.get("eos_token_id")
    if found is None:
        return []
    ids, size = found if isinstance(found, list) else [found], config.get("vocab_size")
    vocabulary = range(size if isinstance(size, int) else 2**31)
    if not ids or not all(type(token) is int and token in vocabulary for token in ids):
        raise StartupError(f"{file}: eos_token_id: must be a token's id, or a list of them, not {found!r}")
    return ids


def identify(checkpoint: Path, quantization: str) -> BaseIdentity:
    """The base's four digests, read from the checkpoint's files; `quantization` is "nf4" or "none".

    The loaded weights would not do: bitsandbytes may repack them, which changes their bytes.
    """
    lines = [f"{file_sha256(file)}  {file.name}\n" for file in sorted(checkpoint.glob("*.safetensors"))]
    return BaseIdentity(
        weights=hashlib.sha256("".join(lines).encode()).hexdigest(),
        quantization="nf4-double-64" if quantization == "nf4" else "none",
        tokenizer=file_sha256(checkpoint / "tokenizer.json"),
        chat_template=_template_digest(checkpoint),
    )


def _template_digest(checkpoint: Path) -> str:
    jinja, config = checkpoint / "chat_template.jinja", checkpoint / "tokenizer_config.json"
    template = None
    if jinja.is_file():
        with loading(jinja):
            template = jinja.read_text()
    elif config.is_file():
        template = read_json(config).get("chat_template")
    if template is None:
        return ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return "it needs code of its own (auto_map), which is never run"
    return textwrap.shorten(text.splitlines()[0], 300)
