"""The upload gate: everything about an artifact that can be checked without running the base on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hatrack.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, BaseIdentity, Manifest
from hatrack_server.adapters import methods
from hatrack_server.adapters.safetensors_header import read_header
from hatrack_server.adapters.strict_json import parse_object
from hatrack_server.catalog.finite import first_non_finite
from hatrack_server.catalog.upload import MAX_JSON_BYTES
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import Artifact, BaseInfo, BaseShapes, ProgramSpec

MAX_DIGEST_CHARACTERS = 80

_NO_MANIFEST = "no manifest.json: the base that it was trained on is unknown"
_OTHER = {
    "weights": "it was trained on another base than this server's",
    "quantization": "it was trained on another quantization of the base ({theirs}; this server has {ours})",
    "tokenizer": "it was trained with another tokenizer than this server's",
    "chat_template": "it was trained with another chat template than this server's",
}
# With these others it would answer all the same, only worse.
_REFUSED = ("weights", "chat_template")


@dataclass(frozen=True)
class Checked:
    """What the gate found in an artifact that it lets pass."""

    spec: ProgramSpec
    trained_on: BaseIdentity | None  # as its manifest says; None without one


def check(artifact: Artifact, base: BaseInfo, *, max_rank: int) -> Checked:
    """Checks the files of `artifact` against `base`; reads every byte once, and changes nothing.

    Raises InvalidArtifact naming the file, key or tensor that is wrong: JSON that isn't plain and small, a method or
    setting that isn't served, tensors other than the configuration asks for on this base, numbers that aren't finite,
    or a manifest that names other content, another base's weights or another chat template.
    """
    spec = describe(artifact.path, base.shapes, max_rank=max_rank)
    if spec.virtual_tokens > base.max_model_len - 2:  # a prompt and a completion have at least one token each
        message = f"{spec.virtual_tokens} leave no room for text in the context of {base.max_model_len} tokens"
        raise InvalidArtifact(f"{CONFIG_FILE}: num_virtual_tokens", message)
    if spec.resident_bytes > base.adapter_bytes:
        message = f"it takes {spec.resident_bytes} bytes, the server's adapter memory holds {base.adapter_bytes}"
        raise InvalidArtifact(WEIGHTS_FILE, message)
    if not (artifact.path / MANIFEST_FILE).is_file():
        return Checked(spec, None)
    manifest = _read_manifest(artifact.path)
    _check_manifest(manifest, artifact, spec, base.identity)
    return Checked(spec, manifest.base)


def describe(directory: Path, base: BaseShapes, *, max_rank: int) -> ProgramSpec:
    """What the artifact in `directory` is; all of `check` that needs no more of the base than its shapes."""
    config = _read_json(directory, CONFIG_FILE)
    headers = read_header(_existing(directory, WEIGHTS_FILE))
    spec = methods.describe(config, headers, base, max_rank=max_rank)
    tensor = first_non_finite(directory / WEIGHTS_FILE, headers)
    if tensor is not None:
        raise InvalidArtifact(f"{WEIGHTS_FILE}: {tensor}", "holds NaN or infinity")
    return spec


def warnings(trained_on: BaseIdentity | None, served: BaseIdentity) -> tuple[str, ...]:
    """What speaks against serving an adapter on this base; nothing when a manifest names the very same."""
    if trained_on is None:
        return (_NO_MANIFEST,)
    differing = [key for key in _OTHER if getattr(trained_on, key) != getattr(served, key)]
    return tuple(_OTHER[key].format(theirs=getattr(trained_on, key), ours=getattr(served, key)) for key in differing)


def _check_manifest(manifest: Manifest, artifact: Artifact, spec: ProgramSpec, ours: BaseIdentity) -> None:
    if manifest.artifact != artifact.digest:
        raise InvalidArtifact(f"{MANIFEST_FILE}: artifact", "it was written for other files than these")
    if manifest.method != spec.method:
        raise InvalidArtifact(f"{MANIFEST_FILE}: method", f"the configuration says {spec.method}")
    for key, value in asdict(manifest.base).items():
        if len(value) > MAX_DIGEST_CHARACTERS or not value.isascii():  # it is kept, and shown
            raise InvalidArtifact(
                f"{MANIFEST_FILE}: base.{key}", f"must have at most {MAX_DIGEST_CHARACTERS} ASCII characters"
            )
    for key in _REFUSED:
        if getattr(manifest.base, key) != getattr(ours, key):
            raise InvalidArtifact(f"{MANIFEST_FILE}: base.{key}", _OTHER[key])


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    try:
        return parse_object(_read_small(directory, name))
    except ValueError as error:
        raise InvalidArtifact(name, str(error)) from None


def _read_manifest(directory: Path) -> Manifest:
    _read_json(directory, MANIFEST_FILE)  # strict where the contract's own reader is lenient
    try:
        return Manifest.from_json(_read_small(directory, MANIFEST_FILE).decode())
    except ValueError as error:
        raise InvalidArtifact(MANIFEST_FILE, str(error)) from None


def _read_small(directory: Path, name: str) -> bytes:
    with _existing(directory, name).open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise InvalidArtifact(name, f"must have at most {MAX_JSON_BYTES} bytes")
    return data


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise InvalidArtifact(name, "missing")
    return path
