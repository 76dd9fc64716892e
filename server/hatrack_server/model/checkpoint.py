"""Finding a checkpoint's files and saying which base they are. No torch: the front process needs both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from hatrack.manifest import BaseIdentity, file_sha256
from hatrack_server.errors import StartupError

TEXT_PATTERNS = ("*.json", "*.jinja")
FILE_PATTERNS = ("*.safetensors", *TEXT_PATTERNS)


def resolve_checkpoint(path_or_id: str, *, weights: bool = True) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded into the hub's own cache first.

    Without `weights`, only its configuration must be there, and of a hub id no weights are downloaded. Raises
    StartupError, in one sentence, when there is no such checkpoint or a file is missing.
    """
    path = Path(path_or_id)
    if not path.is_dir():
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
        template = jinja.read_text()
    elif config.is_file():
        template = json.loads(config.read_text()).get("chat_template")
    if template is None:
        return ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
