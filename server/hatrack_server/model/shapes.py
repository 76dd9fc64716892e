"""Where adapters may act in a base: told by the loaded model, or by its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hatrack_server.model.checkpoint import loading
from hatrack_server.model.load import read_config, without_weights
from hatrack_server.model.probe import refuse_unservable
from hatrack_server.types import AttentionShape, BaseShapes, LinearShape


def shapes_of_checkpoint(checkpoint: Path) -> BaseShapes:
    """What the server that serves `checkpoint` would tell, without its weights; raises StartupError as it would."""
    config = read_config(checkpoint)
    refuse_unservable(config)
    model = without_weights(config, attn_implementation="eager")
    linears = linear_layers(model)
    attention = attention_modules(model)
    cache = DynamicCache()
    with loading(checkpoint / "config.json"):
        model(torch.tensor([[0, 1]], device="meta"), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return base_shapes(model, linears, attention, cache)


def base_shapes(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear | Conv1D], attention: Iterable[str], cache: DynamicCache
) -> BaseShapes:
    """From a model's linear layers and attention modules by name, and the cache of a forward pass."""
    names = {module: name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    head = names.get(model.get_output_embeddings())
    width = embedding.weight.shape[1]
    replaceable = {names[module]: module for module in (embedding, *residual_norms(model))}
    if head is not None and not isinstance(linears[head], Linear4bit):
        replaceable[head] = linears[head]
    return BaseShapes(
        linears={name: _linear_shape(layer) for name, layer in linears.items()},
        embedding=names[embedding],
        width=width,
        attention=tuple(AttentionShape(name, *kv) for name, kv in zip(attention, kv_shapes(cache), strict=False)),
        embedding_rows=embedding.weight.shape[0],
        # The modelling code rounds it to the embedding's precision.
        embedding_scale=torch.tensor(getattr(embedding, "scalar_embed_scale", 1.0)).to(embedding.weight.dtype).item(),
        replaceable={
            name: {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
            for name, module in replaceable.items()
        },
        head=head,
        tied=head is not None and linears[head].weight is embedding.weight,
    )


def kv_shapes(cache: DynamicCache) -> list[tuple[int, int, int]]:
    """(kv_heads, key dim, value dim) of each layer, as the model really made them."""
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """All that adapters may target, by name. GPT-2's Conv1D is one, and a plain linear layer once it is quantised."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules by name, layer by layer: they know their layer and own linears. None unless one each."""
    linears, layers = set(linear_layers(model).values()), range(model.config.get_text_config().num_hidden_layers)
    found = {
        module.layer_idx: (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int) and linears.intersection(module.children())
    }
    return dict(found[layer] for layer in layers) if found.keys() == set(layers) else {}


def residual_norms(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The norms of the residual stream: vectors of its width are all that they have."""
    width = model.get_input_embeddings().weight.shape[1]
    for module in model.modules():
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        if "weight" in shapes and shapes.keys() <= {"weight", "bias"} and set(shapes.values()) == {(width,)}:
            yield module


def _linear_shape(layer: nn.Linear | Conv1D) -> LinearShape:
    if isinstance(layer, Conv1D):
        return LinearShape(layer.weight.shape[1], layer.weight.shape[0])
    return LinearShape(layer.out_features, layer.in_features)
