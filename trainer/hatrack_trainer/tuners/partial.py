"""Weights of the base's own, trained as they are, for PEFT: norms, biases (BitFit, Ben Zaken et al. 2022,
arXiv:2106.10199), the output head, whole layers at the top.

Each is copied in float32, computes rounded to the base's precision, and is saved whole; the base keeps its own. PEFT
0.21 has no such method. Importing this module registers it, as PARTIAL; a stock PEFT can't load what it saves.

Per module the file holds `partial_weights.weight` or `partial_weights.bias`, or both, in the shapes of the base's. The
head is one of PEFT's `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitsandbytes.nn import Params4bit
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hatrack_server.model.shapes import residual_norms
from hatrack_trainer.tuners.peft_types import new_peft_type

NAME = "PARTIAL"
PEFT_TYPE = new_peft_type(NAME)


@dataclass
class PartialConfig(PeftConfig):
    """parts: some of norms, biases, lm_head. last_layers: how many of the top layers are trained whole."""

    parts: list[str] = field(default_factory=list)
    last_layers: int = 0
    # These PEFT reads; they follow from the others.
    target_modules: str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        """Called by dataclasses."""
        super().__post_init__()
        self.peft_type = PEFT_TYPE


def trained_parameters(base: PreTrainedModel, parts: Sequence[str], last_layers: int) -> dict[str, list[str]]:
    """The names of the parameters that are trained, by the full name of their module; of the head, see `head_name`.

    `norms` are those of the residual stream: queries' and keys' stay as they are. `biases` are all but the head's.
    `base` may be without weights. Raises ValueError naming the key that asks for what the base lacks.
    """
    whole = {module for block in last_blocks(base, last_layers).values() for module in _leaves(block)}
    if "norms" in parts:
        whole.update(residual_norms(base))
    found = {}
    for name, module in base.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        found[name] = own if module in whole else [key for key in own if key == "bias" and "biases" in parts]
    found.pop(head_name(base), None)
    if "biases" in parts and not any("bias" in own for own in found.values()):
        raise ValueError(f"parts: biases: a base of {base.config.model_type} has none")
    return {name: own for name, own in found.items() if own}


def head_name(base: PreTrainedModel) -> str:
    """The full name of the output head."""
    head = base.get_output_embeddings()
    return next(name for name, module in base.named_modules() if module is head)


def last_blocks(base: PreTrainedModel, count: int) -> dict[str, nn.Module]:
    """The top `count` decoder layers by name; raises ValueError when there are fewer."""
    total = base.config.get_text_config().num_hidden_layers
    if count > total:
        raise ValueError(f"last_layers: the base has {total}")
    stacks = ((name, one) for name, one in base.named_modules() if isinstance(one, nn.ModuleList) and len(one) == total)
    name, stack = next(stacks)
    return {f"{name}.{index}": stack[index] for index in range(total - count, total)}


def _leaves(block: nn.Module) -> Iterator[nn.Module]:
    for name, module in block.named_modules():
        own = {key for key, _ in module.named_parameters(recurse=False)}
        if own and (own - {"weight", "bias"} or any(module.children())):
            raise ValueError(f"last_layers: {name} of this base is more than a weight and a bias, and can't be trained")
        if own:
            yield module


class PartialLayer(nn.Module, BaseTunerLayer):
    """A module of the base that computes with parameters of its own in place of some or all of the base's."""

    adapter_layer_names = ("partial_weights",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, names: Iterable[str], inference_mode: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        own = nn.ParameterDict({name: _copy(base_layer.get_parameter(name)) for name in names})
        self.partial_weights = nn.ModuleDict({adapter_name: own})
        tuner: Any = self  # of PEFT's classes mypy knows nothing
        tuner.set_adapter(adapter_name, inference_mode=inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base's module would give if the parameters were its own."""
        own = {name: one.to(self.base_layer.get_parameter(name).dtype) for name, one in self.own().items()}
        result: Tensor = functional_call(self.base_layer, own, args, kwargs)
        return result

    def merge(self, **_: Any) -> None:
        """Makes the parameters the base's; modules that share the base's weight, as an embedding does, keep theirs."""
        tuner: Any = self
        for name, one in self.own().items():
            dtype = self.base_layer.get_parameter(name).dtype
            setattr(self.base_layer, name, nn.Parameter(one.detach().to(dtype), requires_grad=False))
        self.merged_adapters += tuner.active_adapters

    def unmerge(self) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError("the base's own weights are gone")

    def own(self) -> dict[str, nn.Parameter]:
        """Those in use: none while adapters are disabled, or once they are the base's."""
        tuner: Any = self
        used = () if tuner.disable_adapters or tuner.merged else tuner.active_adapters
        adapters: Any = self.partial_weights
        return {key: one for name in used if name in adapters for key, one in adapters[name].items()}


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, Params4bit):
        raise ValueError("weights that are quantised can't be trained; load them unquantised")
    return nn.Parameter(parameter.detach().float().clone())


class PartialModel(BaseTuner):
    """What PEFT makes of a base and a PartialConfig."""

    prefix = "partial_"
    tuner_layer_cls = PartialLayer

    def _prepare_adapter_config(self, peft_config: PartialConfig, _model_config: dict[str, Any]) -> PartialConfig:
        self._trained = trained_parameters(self.model, peft_config.parts, peft_config.last_layers)
        if not self._trained:  # the head alone
            peft_config.target_modules = DUMMY_TARGET_MODULES
        if "lm_head" in peft_config.parts:
            # TRL multiplies by the head's weight without calling it, which it refuses to do with other kinds of layers.
            peft_config.modules_to_save = [head_name(self.model)]
        return peft_config

    def _check_target_module_exists(self, _config: PartialConfig, key: str) -> bool:
        return key in self._trained

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = self.tuner_layer_cls(target, adapter_name, self._trained[current_key], peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)


register_peft_method(name=NAME.lower(), config_cls=PartialConfig, model_cls=PartialModel, prefix=PartialModel.prefix)


def begin_at_the_base(model: nn.Module) -> None:
    """Gives copies in float32 the base's values, which were rounded on their way there."""
    for module in model.modules():
        if isinstance(module, PartialLayer):
            for name, parameter in module.own().items():
                parameter.data.copy_(module.base_layer.get_parameter(name))
        elif isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                copy.load_state_dict(module.original_module.state_dict())
                copy.register_forward_pre_hook(_in_its_own_dtype)


def _in_its_own_dtype(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(head.get_parameter("weight").dtype),)
