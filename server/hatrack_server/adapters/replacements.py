"""What a configuration may ask for beside its method: modules trained whole (`modules_to_save`) and new embeddings of
single tokens (`trainable_token_indices`); and the copies of the base's embedding and head that PEFT may save with them.

PEFT 0.21 keeps the parameters of a whole module as `<module>.weight` and `.bias`, the embeddings of n tokens as
`<module>.token_adapter.trainable_tokens_delta` (n, width), which are the embeddings themselves and no difference, and
copies as `<module>.weight` or `<module>.base_layer.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hatrack.manifest import WEIGHTS_FILE
from hatrack_server.adapters.peft_linear import PREFIX, flag
from hatrack_server.adapters.peft_targets import config_field, names_of
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

Shapes = dict[str, tuple[int, ...]]

DELTA = "token_adapter.trainable_tokens_delta"
COPIED = ("", "base_layer.", "token_adapter.base_layer.")  # what PEFT puts before the parameter's name


class Replacement(Protocol):
    """Tensors of a file that stand in place of the base's own parameters."""

    @property
    def shapes(self) -> Shapes:
        """Of these tensors, by their keys in the file."""

    @property
    def parameters(self) -> int:
        """How many of their numbers were trained."""

    @property
    def resident(self) -> int:
        """Bytes in memory, when the base computes in 16 bits."""

    def compile(self, tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
        """The pieces that they make; raises InvalidArtifact where only their numbers show what is wrong."""


@dataclass(frozen=True)
class WholeModule:
    """All parameters of one module."""

    module: str
    of_base: Shapes  # by the parameter's name
    saved_in: str = ""  # what a key has between the module and the parameter's name

    @property
    def shapes(self) -> Shapes:
        """See Replacement."""
        return {self._key(name): shape for name, shape in self.of_base.items()}

    @property
    def parameters(self) -> int:
        """See Replacement."""
        return sum(map(math.prod, self.of_base.values()))

    @property
    def resident(self) -> int:
        """See Replacement."""
        return 2 * self.parameters

    def compile(self, tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:  # noqa: ARG002
        """See Replacement."""
        from hatrack_server.adapters.pieces import ReplacedModule

        yield self.module, ReplacedModule(**{name: tensors[self._key(name)] for name in self.of_base})

    def _key(self, parameter: str) -> str:
        return f"{PREFIX}{self.module}.{self.saved_in}{parameter}"


@dataclass(frozen=True)
class TokenEmbeddings:
    """Rows of the embedding's weight, or of the head's: those of some tokens."""

    key: str
    tokens: tuple[int, ...]
    width: int
    embedding: str | None
    head: str | None  # both, where they share one weight

    @property
    def shapes(self) -> Shapes:
        """See Replacement."""
        return {self.key: (len(self.tokens), self.width)}

    @property
    def parameters(self) -> int:
        """See Replacement."""
        return len(self.tokens) * self.width

    @property
    def resident(self) -> int:
        """See Replacement."""
        places = [self.embedding, self.head]
        return len(self.tokens) * (8 + 2 * self.width) * (len(places) - places.count(None))

    def compile(self, tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
        """See Replacement."""
        import torch

        from hatrack_server.adapters.pieces import ReplacedEmbeddings, ReplacedScores

        tokens, rows = torch.tensor(self.tokens), tensors[self.key]
        if self.embedding:
            yield self.embedding, ReplacedEmbeddings(tokens, rows * base.shapes.embedding_scale)
        if self.head:
            yield self.head, ReplacedScores(tokens, rows)


@dataclass(frozen=True)
class Copy:
    """A parameter of the base, saved though training left it alone; it is checked, and takes no memory."""

    key: str
    module: str
    parameter: str
    shape: tuple[int, ...]
    parameters: int = 0
    resident: int = 0

    @property
    def shapes(self) -> Shapes:
        """See Replacement."""
        return {self.key: self.shape}

    def compile(self, tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
        """See Replacement."""
        own, copied = base.parameter(self.module, self.parameter), tensors[self.key]
        if not copied.to(own.dtype).equal(own):
            message = "is no copy of this base's own; what was trained must be named in modules_to_save"
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {self.key}", message)
        yield from ()


def replacements(config: Mapping[str, Any], keys: Collection[str], base: BaseShapes) -> list[Replacement]:
    """Those that `config` asks for, and the copies among a file's `keys`; raises InvalidArtifact naming the setting."""
    whole = _whole_modules(config, base)
    tokens = [_token_embeddings(module, wanted, base) for module, wanted in _token_targets(config, base).items()]
    return [*whole, *tokens, *_copies(keys, {one.module for one in whole}, base)]


def _whole_modules(config: Mapping[str, Any], base: BaseShapes) -> list[WholeModule]:
    modules: list[str] = []
    for name in sorted(names_of(config, "modules_to_save")):
        found = [module for module in base.replaceable if module.endswith(name)]
        if not found:
            message = f"{name!r} is neither the embedding, nor an unquantised output head, nor a norm"
            raise InvalidArtifact(config_field("modules_to_save"), message)
        modules += found
    ends = [base.embedding, base.head]
    if base.tied and flag(config, "ensure_weight_tying") and not {*ends}.isdisjoint(modules):
        modules += [module for module in ends if module]  # trained as one, and saved twice
    return [WholeModule(module, base.replaceable[module]) for module in dict.fromkeys(modules)]


def _token_targets(config: Mapping[str, Any], base: BaseShapes) -> dict[str, Any]:
    key = "trainable_token_indices"
    wanted = config.get(key)
    if wanted is None:
        return {}
    by_name = wanted if isinstance(wanted, dict) else {base.embedding: wanted}
    targets: dict[str, Any] = {}
    for name, tokens in by_name.items():
        module = next((module for module in (base.embedding, base.head) if module and module.endswith(name)), None)
        if module is None or module not in base.replaceable:
            raise InvalidArtifact(
                config_field(key), f"{name!r} is neither the embedding nor an unquantised output head"
            )
        targets[module] = tokens
    if base.tied and base.head in targets and targets.pop(base.head) != targets.get(base.embedding):
        message = "the output head shares the embedding's weight here, so that both have the same tokens"
        raise InvalidArtifact(config_field(key), message)
    return targets


def _token_embeddings(module: str, tokens: Any, base: BaseShapes) -> TokenEmbeddings:
    return token_embeddings(module, tokens, base, DELTA, "trainable_token_indices")


def token_embeddings(module: str, tokens: Any, base: BaseShapes, saved_as: str, field: str) -> TokenEmbeddings:
    """Of `tokens`, a list that stands in `field` of the configuration; raises InvalidArtifact."""
    rows = base.replaceable[module]["weight"][0]
    in_range = isinstance(tokens, list) and all(type(token) is int and 0 <= token < rows for token in tokens)
    if not in_range or not tokens or len(set(tokens)) < len(tokens):
        raise InvalidArtifact(config_field(field), f"must be a list of different token ids below {rows}")
    head = base.head if base.tied or module == base.head else None
    if head and "bias" in base.replaceable[head]:
        raise InvalidArtifact(config_field(field), "rows of an output head that has a bias are not supported")
    embedding = base.embedding if module == base.embedding else None
    return TokenEmbeddings(f"{PREFIX}{module}.{saved_as}", tuple(tokens), base.width, embedding, head)


def _copies(keys: Collection[str], whole: Collection[str], base: BaseShapes) -> list[Copy]:
    found = []
    for module in (base.embedding, base.head):
        if module in base.replaceable and module not in whole:
            for parameter, shape in base.replaceable[module].items():
                candidates = (f"{PREFIX}{module}.{infix}{parameter}" for infix in COPIED)
                found += [Copy(key, module, parameter, shape) for key in candidates if key in keys]
    return found
