"""The adapter methods that Hatrack trains: each is a class in a module here, found by the name in its `method`.

A class states its keys in the YAML file, which are read before torch is imported: what a method needs torch or PEFT
for, it imports where it needs it.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from hatrack_trainer.section import Section

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PretrainedConfig, TrainerCallback

DEFAULT = "lora"
CAUSAL_LM = "CAUSAL_LM"  # PEFT's task type of all of them

LayerNames = Annotated[list[str], Field(min_length=1)]
"""Names of linear layers, e.g. [q_proj, v_proj]: each selects all layers whose full name ends with it."""


class Method(Section):
    """The `adapter` section: `method` chooses the class, whose other fields are its own keys."""

    method: str
    default_learning_rate: ClassVar[float]
    """What an absent `train.learning_rate` means; for bases of a billion parameters or less."""
    allows_checkpointing: ClassVar[bool] = True
    """Whether activations may be computed twice (`train.activation_checkpointing`)."""
    allows_packing: ClassVar[bool] = True
    """Whether several documents may share a row (`train.packing`)."""
    may_lack_gradients: ClassVar[tuple[str, ...]] = ()
    """What the names of those trainable tensors hold that may go without a gradient for many steps."""

    @property
    def served(self) -> bool:
        """Whether the server takes what comes out; else it is merged."""
        return True

    @property
    def virtual_tokens(self) -> int:
        """How many of the base's positions it takes before the text's."""
        return 0

    def named_layers(self) -> list[str]:
        """Every layer that the section names, each of which must be one of the base's linear layers."""
        return []

    def refuse(self, base: PretrainedConfig) -> None:
        """Raises UsageError, naming the key, when the method can't be trained on such a base."""

    def unquantised(self, _base: PretrainedConfig) -> list[str]:
        """The base's modules that are loaded as the checkpoint has them, though the rest is quantised."""
        return []

    def remarks(self, _base: PretrainedConfig) -> list[str]:
        """What the user should know before the run, in sentences."""
        return []

    def peft_config(self) -> PeftConfig:
        """The same for PEFT. Raises NotImplementedError here."""
        raise NotImplementedError

    def prepare(self, model: PeftModel) -> None:
        """Changes what PEFT and TRL made where it would not train as it is. Called once, before the first step."""

    def callbacks(self) -> list[TrainerCallback]:
        """What has to happen in training besides the optimizer's steps."""
        return []

    def state(self, _model: PeftModel) -> dict[str, Tensor]:
        """What those steps go by besides the trainable tensors, by names of its own; a checkpoint keeps it."""
        return {}

    def load_state(self, model: PeftModel, state: dict[str, Tensor]) -> None:
        """Makes `state(model)` what it was when it gave this."""


class Targeted(Method):
    """What is laid beside linear layers."""

    target_modules: LayerNames | Literal["all-linear"] = "all-linear"
    """all-linear is every linear layer but the output head."""

    def named_layers(self) -> list[str]:
        """See Method."""
        return [] if self.target_modules == "all-linear" else self.target_modules


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Every method by its name, in the names' order."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    classes = [item for module in modules for item in vars(module).values() if _is_method(item)]
    found = {name: one for one in classes for name in get_args(one.model_fields["method"].annotation)}
    return dict(sorted(found.items()))


def method_of(section: object) -> type[Method]:
    """The class that reads an `adapter` section: that of its `method`; of an unknown one the default, to refuse it."""
    name = section.get("method", DEFAULT) if isinstance(section, dict) else DEFAULT
    return methods().get(str(name), methods()[DEFAULT])


def read_method(section: Any) -> Any:
    """A mapping as the section of the method it names; anything else as it is. Raises pydantic's ValidationError."""
    return method_of(section).model_validate(section) if isinstance(section, dict) else section


def _is_method(item: object) -> bool:
    return isinstance(item, type) and issubclass(item, Method)
