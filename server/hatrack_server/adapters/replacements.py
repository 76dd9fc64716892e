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
from hatrack_server.adapters.peft_linear import PREFIX, flag, precise
from hatrack_server.adapters.peft_targets import config_field, names_of
from hatrack_server.errors import InvalidArtifact
from hatrack_server.types import BaseShapes

if TYPE_CHECKING:
    from torch import Tensor

    from hatrack_server.adapters.base_layers import BaseLayers
    from hatrack_server.adapters.pieces import Piece

Shapes = dict[str, tuple[int, ...]]

DELTA = "token_adapter.trainable_tokens_delta"
FLOAT16_STEP = 2**-24  # between its smallest numbers
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
    """All parameters of the embedding, the head or a norm."""

    module: str
    of_base: Shapes  # by the parameter's name
    saved_as: str  # what a key has before the parameter's name, without PREFIX

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
        is_norm = len(self.of_base["weight"]) == 1  # which is kept in float32
        return (4 if is_norm else 2) * self.parameters

    def compile(self, tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
        """See Replacement."""
        from hatrack_server.adapters.pieces import ReplacedEmbedding, ReplacedHead, ReplacedNorm

        weight = tensors[self._key("weight")]
        bias = tensors[self._key("bias")] if "bias" in self.of_base else None
        if self.module == base.shapes.embedding:
            yield self.module, ReplacedEmbedding(weight * base.shapes.embedding_scale)
        elif self.module == base.shapes.head:
            yield self.module, ReplacedHead(weight, bias)
        else:
            yield self.module, ReplacedNorm(precise(weight) + base.norm_offset(self.module), bias)

    def _key(self, parameter: str) -> str:
        return f"{PREFIX}{self.saved_as}.{parameter}"


@dataclass(frozen=True)
class TokenEmbeddings:
    """Rows of the embedding's weight, of the head's, or of both where they share one: those of some tokens."""

    keys: Mapping[str, str]  # by the module whose rows they are
    tokens: tuple[int, ...]
    width: int

    @property
    def shapes(self) -> Shapes:
        """See Replacement."""
        return dict.fromkeys(self.keys.values(), (len(self.tokens), self.width))

    @property
    def parameters(self) -> int:
        """See Replacement."""
        return len(self.tokens) * self.width

    @property
    def resident(self) -> int:
        """See Replacement."""
        return len(self.tokens) * (8 + 2 * self.width) * len(self.keys)

    def compile(self, tensors: Mapping[str, Tensor], base: BaseLayers) -> Iterator[tuple[str, Piece]]:
        """See Replacement."""
        import torch

        from hatrack_server.adapters.pieces import ReplacedScores, ReplacedTokens

        tokens, order = torch.tensor(self.tokens).sort()
        for module, key in self.keys.items():
            rows = tensors[key][order]
            if module == base.shapes.embedding:
                yield module, ReplacedTokens(tokens, rows * base.shapes.embedding_scale)
            else:
                yield module, ReplacedScores(tokens, rows)


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
        import torch

        own, copied = base.end(self.module, self.parameter), tensors[self.key]
        # Either may have been rounded to another precision than the other.
        rounding = 0.0 if own.dtype is copied.dtype else max(torch.finfo(t.dtype).eps for t in (own, copied))
        if not torch.allclose(copied.float(), own.float(), rtol=rounding, atol=FLOAT16_STEP if rounding else 0):
            message = "is no copy of this base's own; what was trained must be named in modules_to_save"
            raise InvalidArtifact(f"{WEIGHTS_FILE}: {self.key}", message)
        yield from ()


def replacements(config: Mapping[str, Any], keys: Collection[str], base: BaseShapes) -> list[Replacement]:
    """Those that `config` asks for, and the copies among a file's `keys`; raises InvalidArtifact naming the setting."""
    whole = _whole_modules(config, keys, base)
    tokens = [_token_embeddings(module, wanted, base) for module, wanted in _token_targets(config, base).items()]
    modules = {one.module for one in whole}
    if any(modules.intersection(one.keys) for one in tokens):
        message = "names tokens of a module that modules_to_save replaces whole"
        raise InvalidArtifact(config_field("trainable_token_indices"), message)
    return [*whole, *tokens, *_copies(keys, modules, base)]


def _whole_modules(config: Mapping[str, Any], keys: Collection[str], base: BaseShapes) -> list[WholeModule]:
    field = config_field("modules_to_save")
    modules: list[str] = []
    for name in sorted(names_of(config, "modules_to_save")):
        found = [module for module in base.replaceable if module.endswith(name)]
        if not found:
            message = f"{name!r} is neither the embedding, nor an unquantised output head, nor a norm as wide as them"
            raise InvalidArtifact(field, message)
        saved = {key.removeprefix(PREFIX).rpartition(".")[0] for key in keys}
        if others := [module for module in saved - base.replaceable.keys() if module.endswith(name)]:
            message = f"{name!r} also means {min(others)}, which can't be replaced: give full names"
            raise InvalidArtifact(field, message)
        modules += found
    if base.tied and flag(config, "ensure_weight_tying") and not base.ends.isdisjoint(modules):
        modules += sorted(base.ends)  # both were trained as one weight, which is saved under both names
    return [WholeModule(module, base.replaceable[module], module) for module in dict.fromkeys(modules)]


def _token_targets(config: Mapping[str, Any], base: BaseShapes) -> dict[str, Any]:
    key = "trainable_token_indices"
    wanted = config.get(key)
    if wanted is None:
        return {}
    by_name = wanted if isinstance(wanted, dict) else {base.embedding: wanted}
    targets: dict[str, Any] = {}
    for name, tokens in by_name.items():
        module = next((module for module in sorted(base.ends) if module.endswith(name)), None)
        if module is None:
            message = f"{name!r} is neither the embedding nor an unquantised output head"
            raise InvalidArtifact(config_field(key), message)
        targets[module] = tokens
    if base.tied and base.head in targets and targets.pop(base.head) != targets.get(base.embedding):
        message = "the output head shares the embedding's weight here, so that both have the same tokens"
        raise InvalidArtifact(config_field(key), message)
    return targets


def _token_embeddings(module: str, tokens: Any, base: BaseShapes) -> TokenEmbeddings:
    key = f"{PREFIX}{module}.{DELTA}"
    keys = dict.fromkeys(base.ends, key) if base.tied else {module: key}
    return token_embeddings(keys, tokens, base, "trainable_token_indices")


def token_embeddings(keys: Mapping[str, str], tokens: Any, base: BaseShapes, field: str) -> TokenEmbeddings:
    """Of `tokens`, a list that stands in `field` of the configuration; raises InvalidArtifact."""
    in_range = isinstance(tokens, list) and all(
        type(token) is int and 0 <= token < base.embedding_rows for token in tokens
    )
    if not in_range or not tokens or len(set(tokens)) < len(tokens):
        message = f"must be a list of different token ids below {base.embedding_rows}"
        raise InvalidArtifact(config_field(field), message)
    if any("bias" in base.replaceable[module] for module in keys):
        raise InvalidArtifact(config_field(field), "rows of an output head that has a bias are not supported")
    return TokenEmbeddings(keys, tuple(tokens), base.width)


def _copies(keys: Collection[str], whole: Collection[str], base: BaseShapes) -> list[Copy]:
    return [
        Copy(key, module, parameter, shape)
        for module in sorted(base.ends.difference(whole))
        for parameter, shape in base.replaceable[module].items()
        for infix in COPIED
        if (key := f"{PREFIX}{module}.{infix}{parameter}") in keys
    ]
