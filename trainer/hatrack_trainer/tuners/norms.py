"""LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420) of every norm of the residual stream, for PEFT.

PEFT 0.21 looks names up in a table of bases (tuners/ln_tuning/model.py), which lacks many and has one in three of
Qwen2's. Importing this module makes an absent `target_modules` mean all of those norms; files are PEFT's.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LNTuningConfig, LNTuningModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import Tensor, nn

from hatrack_server.model.shapes import residual_norms


class AllNorms(LNTuningModel):
    """PEFT's, but for what an absent `target_modules` means."""

    def _prepare_adapter_config(self, peft_config: LNTuningConfig, _model_config: dict[str, Any]) -> LNTuningConfig:
        if peft_config.target_modules is None:
            found = set(residual_norms(self.model))
            peft_config.target_modules = {name for name, module in self.model.named_modules() if module in found}
        return peft_config

    def _create_new_module(self, *args: Any) -> LNTuningLayer:
        with warnings.catch_warnings():
            # PEFT asks every layer how many features it takes, and knows norms of torch's own alone.
            warnings.filterwarnings("ignore", "Unsupported layer type .* encountered", UserWarning)
            return super()._create_new_module(*args)


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LN_TUNING] = AllNorms


def prepare_norms(model: nn.Module) -> None:
    """Lets copies in float32 begin at the base's values, and give the base's precision."""
    for layer in model.modules():
        if isinstance(layer, LNTuningLayer):
            for copy in layer.ln_tuning_layers.values():
                copy.load_state_dict(layer.base_layer.state_dict())
            layer.register_forward_hook(_in_the_dtype_of_the_input)


def _in_the_dtype_of_the_input(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)
