"""Loading the frozen base, quantised to NF4 with double quantisation (QLoRA, Dettmers et al. 2023) by bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging as transformers_logging

from hatrack_server.errors import StartupError
from hatrack_server.model.checkpoint import loading

log = logging.getLogger(__name__)

Quantization = Literal["nf4", "none"]


def load_base(
    checkpoint: Path,
    *,
    quantization: Quantization,
    dtype: torch.dtype | None,
    device: str,
    attn_implementation: str | None = None,
    storage: torch.dtype = torch.uint8,
    unquantised: Sequence[str] = (),
) -> PreTrainedModel:
    """Loads a decoder-only causal LM in eval mode, every parameter frozen.

    `dtype` is what activations are computed in; None takes bfloat16 with NF4, else the checkpoint's own. Without an
    `attn_implementation`, transformers chooses one. `storage` is what packed NF4 codes lie in, to those who need other
    than bytes: the same bits. `unquantised` names modules that NF4 leaves as they are, with all in them. A checkpoint
    that is NF4 on disk is taken as it is. Raises StartupError for what transformers can't load as a causal LM, for
    weights that don't fit the configuration, for another quantisation on disk, and for stacked experts, which
    bitsandbytes silently leaves in 16 bits.
    """
    extra = _quantization_arguments(
        read_config(checkpoint), quantization, dtype or torch.bfloat16, storage, unquantised
    )
    with loading(checkpoint), _no_table():
        model, fit = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=dtype or ("auto" if quantization == "none" else torch.bfloat16),
            device_map=device,
            attn_implementation=attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in a sentence
            **extra,
        )
    _check_fit(checkpoint, model, fit)
    if quantization == "nf4":
        _refuse_unquantised_experts(model)
        _let_go_of_files(model)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def read_config(checkpoint: Path) -> PretrainedConfig:
    """The checkpoint's configuration; raises StartupError when transformers can't read it."""
    with loading(checkpoint / "config.json"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=False
        )
    return config


def without_weights(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The base's modules on the meta device, where they hold no numbers; raises StartupError for what is no causal LM.

    `options` are those of transformers' `from_config`.
    """
    with loading(Path(config.name_or_path) / "config.json"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    return model


def prepare_for_training(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking weights in place on the CPU.

    After one forward in eval mode the packed kernel, which has no autograd, would cut most gradients off silently.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantization_arguments(
    config: Any, quantization: Quantization, dtype: torch.dtype, storage: torch.dtype, unquantised: Sequence[str]
) -> dict[str, Any]:
    on_disk = getattr(config, "quantization_config", None)
    if on_disk is not None:
        settings = on_disk if isinstance(on_disk, dict) else on_disk.to_dict()
        if quantization != "nf4" or not settings.get("load_in_4bit") or settings.get("bnb_4bit_quant_type") != "nf4":
            raise StartupError("the checkpoint is quantised on disk otherwise than as bitsandbytes NF4")
        return {}
    if quantization == "none":
        return {}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=_left_alone(config, unquantised) if unquantised else None,
    )
    return {"quantization_config": nf4}


def _left_alone(config: PretrainedConfig, unquantised: Sequence[str]) -> list[str]:
    """`unquantised`, and what transformers leaves alone until it is told of anything: the head, and what is tied."""
    return [*get_keys_to_not_convert(without_weights(config)), *unquantised]


@contextmanager
def _no_table() -> Iterator[None]:
    """Without transformers' table of the tensors that don't fit, of which `_check_fit` says the same in one line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _check_fit(checkpoint: Path, model: PreTrainedModel, fit: Mapping[str, Any]) -> None:
    """Raises StartupError for a weight that would be random; names in the log what is in the files and not used."""
    misfit = f"{checkpoint}: its weights don't fit its config.json"
    if missing := fit["missing_keys"]:
        raise StartupError(f"{misfit}: {min(missing)} is missing")
    for name, shape, wanted in sorted([*fit["mismatched_keys"], *_misshapen_nf4(model)]):
        raise StartupError(f"{misfit}: {name} is of shape {list(shape)}, not {list(wanted)}")
    if unused := fit["unexpected_keys"]:
        log.warning("%s: %d of its tensors are not used, e.g. %s", checkpoint, len(unused), min(unused))


def _misshapen_nf4(model: PreTrainedModel) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """(name, shape, wanted shape) of quantised weights, which transformers doesn't compare."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and (state := layer.weight.quant_state) is not None:
            wanted = (layer.out_features, layer.in_features)
            if tuple(state.shape) != wanted:
                yield f"{name}.weight", state.shape, wanted


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copies what is not packed: on a CPU it lies in the checkpoint's mapped file, all of which would stay resident."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.clone()


def _refuse_unquantised_experts(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            raise StartupError(f"mixture-of-experts weights stay unquantised ({name}): serve with --quantization none")
