"""An adapter merged into its base: a checkpoint of plain weights, which transformers loads without PEFT or Hatrack."""

from __future__ import annotations

import os
import shutil
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hatrack_trainer.tuners.partial  # noqa: F401 - PEFT then knows PARTIAL
from hatrack.manifest import WEIGHTS_FILE, BaseIdentity
from hatrack_server.model.checkpoint import identify
from hatrack_server.model.load import load_base, read_config
from hatrack_trainer.artifact import all_or_nothing, check_output_folder, public_name, resolved
from hatrack_trainer.base import find_base
from hatrack_trainer.errors import UsageError
from hatrack_trainer.mergeable import MergeableAdapter, read_adapter
from hatrack_trainer.progress import without_other_bars

Into = Literal["original", "dequantized"]
Precision = Literal["bfloat16", "float32"]

DTYPES: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MEANING: dict[Into, str] = {
    "original": "the adapter's change is added to the base's own weights. One trained with QLoRA learned on quantised"
    " weights, so answers may be a bit better or worse than the server's; to quantise the result anew, take these.",
    "dequantized": "the adapter's change is added to the base's NF4 weights, dequantised. QLoRA learns on these and the"
    " server computes with them, so answers are the server's to a rounding.",
}
"""What each choice means for the quality of answers."""

MAX_SHARD = "5GB"
# Taken over byte by byte: the checkpoint's tokenizer and chat template have the base's digests.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged, and where it is now."""

    folder: Path
    base: str  # a hub id, or the name of a folder
    adapter: MergeableAdapter


def merge(
    folder: Path,
    *,
    base: str,
    into: Into,
    out: Path,
    precision: Precision = "bfloat16",
    say: Callable[[str], None] = lambda _: None,
) -> Merged:
    """Merges the adapter in `folder` into its base and writes a checkpoint to `out`, all or nothing.

    It is done in float32 on the CPU, so it takes 4 bytes of memory per weight, and rounded once to `precision`. `say`
    gets sentences that the user should see. Raises UsageError for what can't be merged, TrainerError when `out` can't
    be written to the end, or the server's StartupError for the base.
    """
    adapter = read_adapter(folder)
    _check_out(out, folder, base)
    checkpoint = find_base(base, key="--base")
    _refuse_lack_of_originals(checkpoint, into, base)
    identity = identify(checkpoint, "none" if into == "original" else "nf4")
    for doubt in adapter.check_base(identity):
        say(doubt)
    with without_other_bars():
        model = _merged(_plain_base(checkpoint, into), folder).to(DTYPES[precision])
    _refuse_non_finite(model)
    merged = Merged(out, public_name(base), adapter)
    with all_or_nothing(out, "--out") as partial, without_other_bars():
        _save(model, checkpoint, partial)
        (partial / "README.md").write_text(_card(merged, identity, into, precision))
    return merged


def _check_out(out: Path, adapter: Path, base: str) -> None:
    target = resolved(out, "--out")
    if target.is_relative_to(adapter.resolve()):
        raise UsageError(f"--out: {out} is in the adapter's folder, where nothing is ever written")
    is_folder = os.path.isdir(base)  # noqa: PTH112 - pathlib raises at a name that is too long
    if is_folder and target.is_relative_to(Path(base).resolve()):
        raise UsageError(f"--out: {out} is in the base's folder, where nothing is ever written")
    check_output_folder(out, "--out")


def _refuse_lack_of_originals(checkpoint: Path, into: Into, base: str) -> None:
    if into == "original" and getattr(read_config(checkpoint), "quantization_config", None) is not None:
        raise UsageError(
            f"--into original: {base} is quantised on disk and has no original weights; take --into dequantized, or "
            "the checkpoint that it was made from"
        )


def _plain_base(checkpoint: Path, into: Into) -> PreTrainedModel:
    """The weights to merge into: float32, in plain layers, on the CPU."""
    if into == "original":
        return load_base(checkpoint, quantization="none", dtype=torch.float32, device="cpu")
    base = load_base(checkpoint, quantization="nf4", dtype=None, device="cpu")
    for name, layer in list(base.named_modules()):
        if isinstance(layer, Linear4bit):
            base.set_submodule(name, _dequantized(layer))
    base.hf_quantizer.remove_quantization_config(base)
    base.is_loaded_in_4bit = False  # or PEFT would refuse to merge (IA)³
    base._weight_conversions = None  # how files of NF4 were read, which saving would try to reverse
    return base.float()


def _dequantized(layer: Linear4bit) -> nn.Module:
    """A layer of the kind that was quantised: GPT-2's Conv1D keeps its weight the other way round.

    transformers' own `model.dequantize()` makes a linear layer of that too, whose weight is then saved transposed.
    """
    state = layer.weight.quant_state
    state.dtype = torch.float32  # else it would be rounded twice
    weight = dequantize_4bit(layer.weight.data, state)  # [out, in]
    transposed = issubclass(layer.source_cls, Conv1D)
    with torch.device("meta"):
        plain = (
            Conv1D(layer.out_features, layer.in_features)
            if transposed
            else nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        )
    plain.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
    plain.bias = layer.bias
    return plain


@torch.no_grad()
def _merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base with the adapter's change in its weights, by PEFT; changes `base`."""
    try:
        with warnings.catch_warnings():
            # It warns of keys that it does not know, and that shared embeddings and the base's name would need care,
            # which they get here.
            warnings.simplefilter("ignore")
            return _merged_by_peft(base, PeftConfig.from_pretrained(str(folder)), folder)
    except UsageError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise UsageError(f"{folder}: PEFT can't merge this adapter into this base: {reason}") from None


def _merged_by_peft(base: PreTrainedModel, config: PeftConfig, folder: Path) -> PreTrainedModel:
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    shared = head is not None and head.weight is embedding.weight
    adapted = _adapted(base, config, folder)
    if shared:
        # PEFT merges in place, so that what is meant for one of the two would change the other.
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    merged: PreTrainedModel = adapted.merge_and_unload()
    if shared:
        embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        merged.config.tie_word_embeddings = torch.equal(embedding.weight, head.weight)
        merged.tie_weights()
    return merged


def _adapted(base: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    """The base with the adapter beside its weights; PEFT alone would pass over tensors that are missing or left."""
    config.inference_mode = True
    adapted = get_peft_model(base, config)
    tensors = load_file(folder / WEIGHTS_FILE)
    missing = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - tensors.keys()
    if missing:
        raise UsageError(f"{WEIGHTS_FILE}: {min(missing)} is missing")
    left = set_peft_model_state_dict(adapted, tensors).unexpected_keys
    if left:
        raise UsageError(f"{WEIGHTS_FILE}: nothing of this base is adapted by {min(left)}")
    return adapted.eval()


def _refuse_non_finite(model: PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UsageError(f"the merged {name} holds NaN or infinity: the adapter or the base is broken")


def _save(model: PreTrainedModel, checkpoint: Path, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=MAX_SHARD)
    for name in COPIED_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)


def _card(merged: Merged, identity: BaseIdentity, into: Into, precision: Precision) -> str:
    adapter = merged.adapter
    return f"""# {merged.base} with an adapter merged in

- base: `{merged.base}`, weights `{identity.weights}`
- adapter: {adapter.method}, digest `{adapter.digest}`
- merged into the {into} weights, saved in {precision}

With `--into {into}`, {MEANING[into]}
"""
