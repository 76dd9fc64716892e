"""Which adapters can become part of a base's weights: told by their files, before the base is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack.manifest import (
    ARTIFACT_FILES,
    CONFIG_FILE,
    MANIFEST_FILE,
    BaseIdentity,
    Manifest,
    folder_digest,
)
from hatrack_trainer.errors import UsageError

# By PEFT's names: those whose merged weights the tests compare with the adapter itself.
MERGEABLE = frozenset({
    "ADALORA", "C3A", "DEFT", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "LORA", "MISS", "OFT", "PARTIAL", "RANDLORA", "ROAD", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA",
    "WAVEFT",
})  # fmt: skip
NO_CHANGE_OF_WEIGHTS = frozenset({
    "ADAPTION_PROMPT", "BOTTLENECK", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY",
    "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW", "XLORA",
})  # fmt: skip

# Settings of LoRA that act on some tokens only, on other parameters than weights, or on a base of another kind.
UNMERGEABLE_SETTINGS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
# Initialisations that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class MergeableAdapter:
    """An artifact that can be merged."""

    folder: Path
    method: str  # as PEFT spells it
    digest: str
    trained_on: BaseIdentity | None  # None without a manifest

    def check_base(self, base: BaseIdentity) -> list[str]:
        """What speaks against merging it into `base`, in sentences; raises UsageError for another base's weights."""
        theirs = self.trained_on
        if theirs is None:
            return [f"no {MANIFEST_FILE}: the base that it was trained on is unknown"]
        if theirs.weights != base.weights:
            raise UsageError(f"{MANIFEST_FILE}: base.weights: the adapter was trained on another base than this one")
        doubts = {
            "it was trained on unquantised weights: --into original is what it learned on": (
                theirs.quantization == "none" and base.quantization != "none"
            ),
            "it was trained with another tokenizer than this base's": theirs.tokenizer != base.tokenizer,
            "it was trained with another chat template than this base's": theirs.chat_template != base.chat_template,
        }
        return [sentence for sentence, true in doubts.items() if true]


def read_adapter(folder: Path) -> MergeableAdapter:
    """Reads all but the tensors; raises UsageError naming the file, and the key, that speaks against merging it."""
    for name in ARTIFACT_FILES:
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no {name}")
    method = _mergeable_method(_read_config(folder))
    digest = folder_digest(folder)
    return MergeableAdapter(folder, method, digest, _trained_on(folder, digest))


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{CONFIG_FILE}: can't be read: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{CONFIG_FILE}: not a JSON object")
    return config


def _mergeable_method(config: dict[str, Any]) -> str:
    method = str(config.get("peft_type"))
    if method in NO_CHANGE_OF_WEIGHTS:
        raise UsageError(
            f"{method} adapters can't be merged: they add steps to what the model computes, and change no weight"
        )
    if method not in MERGEABLE:
        raise UsageError(
            f"{CONFIG_FILE}: peft_type: {method} adapters can't be merged; these can: {', '.join(sorted(MERGEABLE))}"
        )
    for key in UNMERGEABLE_SETTINGS:
        if config.get(key):
            raise UsageError(f"{CONFIG_FILE}: {key}: an adapter with it can't be merged")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool) and str(init).lower() not in PLAIN_INITS:
        raise UsageError(
            f"{CONFIG_FILE}: init_lora_weights: {init!r} changed the base before training, so the adapter fits no "
            "other; save it with path_initial_model_for_weight_conversion"
        )
    return method


def _trained_on(folder: Path, digest: str) -> BaseIdentity | None:
    try:
        manifest = Manifest.from_json((folder / MANIFEST_FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{MANIFEST_FILE}: {error}") from None
    if manifest.artifact != digest:
        raise UsageError(f"{MANIFEST_FILE}: artifact: it was written for other files than these")
    return manifest.base
