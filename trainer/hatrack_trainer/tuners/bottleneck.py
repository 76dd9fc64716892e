"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247) for PEFT.

`h + up(activation(down(h)))` on what attention and feed-forward give (Houlsby), or feed-forward alone (Pfeiffer),
before the residual stream takes it: that is the output of the projection which ends the block. PEFT 0.21 has no such
method. Importing this module registers it, as BOTTLENECK; a stock PEFT can't load what it saves.

Per module the file holds `bottleneck_down.weight` (r, out_features), `bottleneck_down.bias` (r),
`bottleneck_up.weight` (out_features, r) and `bottleneck_up.bias` (out_features).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu
from transformers.pytorch_utils import Conv1D

from hatrack_trainer.tuners.peft_types import new_peft_type

NAME = "BOTTLENECK"
PREFIX = "bottleneck_"
ACTIVATIONS = {"relu": relu, "gelu": gelu, "silu": silu}
INITIAL_DEVIATION = 1e-2  # Houlsby's; `up` begins at zero, so that training begins at the base

# The projections that end attention and feed-forward, by transformers' model type.
BLOCK_ENDS = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"), ("o_proj", "down_proj")
) | {
    "phi": ("dense", "fc2"),
    "opt": ("out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "dense_4h_to_h"),
    "falcon": ("self_attention.dense", "dense_4h_to_h"),
}


PEFT_TYPE = new_peft_type(NAME)


@dataclass
class BottleneckConfig(PeftConfig):
    """target_modules: the linear layers whose output is adapted; None takes those that `placement` means.

    r: width of the bottleneck. init_weights: False makes everything random, for tests.
    """

    r: int = 64
    activation: Literal["relu", "gelu", "silu"] = "relu"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that is wrong."""
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.r < 1:
            raise ValueError(f"r: must be positive, not {self.r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.placement not in ("houlsby", "pfeiffer"):
            raise ValueError(f"placement: must be houlsby or pfeiffer, not {self.placement!r}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer of the base, of any quantisation, with bottlenecks on its output."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._activations: dict[str, Any] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Adds one bottleneck."""
        tuner: Any = self  # of PEFT's classes mypy knows nothing
        base = tuner.get_base_layer()
        width = base.nf if isinstance(base, Conv1D) else base.out_features
        down, up = nn.Linear(width, config.r), nn.Linear(config.r, width)
        for linear, deviation in ((down, INITIAL_DEVIATION), (up, 0.0 if config.init_weights else INITIAL_DEVIATION)):
            nn.init.normal_(linear.weight, std=deviation)
            nn.init.zeros_(linear.bias)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self._activations[adapter_name] = ACTIVATIONS[config.activation]
        tuner._move_adapter_to_device_of_base_layer(adapter_name)
        tuner.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x[…, in] to […, out]; the bottleneck computes in its own dtype."""
        tuner: Any = self
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in () if tuner.disable_adapters else tuner.active_adapters:
            if name in self._activations:
                down, up = tuner.bottleneck_down[name], tuner.bottleneck_up[name]
                y = y + up(self._activations[name](down(y.to(down.weight.dtype)))).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError("a bottleneck is not linear, so it can't be merged into a weight")

    def unmerge(self) -> None:
        """Nothing was ever merged."""


class BottleneckModel(BaseTuner):
    """What PEFT makes of a base and a BottleneckConfig."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            if model_type not in BLOCK_ENDS:
                raise ValueError(f"target_modules: must be given, since the blocks of {model_type!r} are not known")
            attention, feed_forward = BLOCK_ENDS[model_type]
            houlsby = peft_config.placement == "houlsby"
            peft_config.target_modules = [attention, feed_forward] if houlsby else [feed_forward]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not hasattr(target, "weight") or isinstance(target, nn.Embedding):
            raise TypeError(f"target_modules: {current_key} is no linear layer")
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


register_peft_method(name=NAME.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix=PREFIX)
