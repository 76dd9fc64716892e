"""The model that a run would train, on the meta device: all its shapes and dtypes, and no numbers.

The libraries' own code quantises, wraps and computes it, so it makes the tensors that a run would make; see peak.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from hatrack_server.model.load import Quantization, read_config, without_weights
from hatrack_trainer.methods import Method

FUSED, EAGER = "hatrack_fused_sketch", "hatrack_eager_sketch"
TILE = (4096, 32768)
"""Tokens and words of the logits that TRL's loss makes at once (trl/kernels/chunked_logprob.py, trainer/utils.py)."""
FOLD_BYTES = 29
"""A logit's where no kernel folds a tile in place: seven copies in float32 and a mask (`_backward_tile` there); where
logits are capped, there is one copy more."""


def sketch_base(checkpoint: Path, quantization: Quantization, unquantised: Sequence[str] = ()) -> PreTrainedModel:
    """What `load_base` gives; its attention takes the memory of torch's fused one where transformers takes that."""
    config = read_config(checkpoint)
    dtype = torch.bfloat16 if quantization == "nf4" else config.dtype or torch.float32
    base = without_weights(config, dtype=dtype, attn_implementation=FUSED)
    if not base._supports_sdpa:
        base.set_attn_implementation(EAGER)
    if quantization == "nf4":
        _quantise(base, [*get_keys_to_not_convert(base), *unquantised])
    return base.requires_grad_(False)


def sketch_adapter(base: PreTrainedModel, adapter: Method) -> PeftModel:
    """`base` with a new adapter in float32 around it, as `make_trainer` has it. Changes `base`."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing can be initialised
        model = get_peft_model(base, adapter.peft_config())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapter.prepare(model)
    return model.train()


def sketch_arguments(model: PeftModel, *, checkpointing: bool, autocast: bool) -> None:
    """Does to `model` what the trainer does before the first step."""
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable()
    for parameter in model.parameters():
        if autocast and parameter.requires_grad:
            # Its copies in 16 bits are small; what matters is what is kept of the activations.
            parameter.data = parameter.data.to(model.get_base_model().dtype)


def sketch_step(model: PeftModel, rows: int, tokens: int, *, cuda: bool) -> None:
    """Forward and backward pass of one batch, as TRL's trainers do it. Changes `model`."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden  # TRL's loss goes on from there
    hidden = model(input_ids=torch.zeros(rows, tokens, dtype=torch.long, device="meta"), use_cache=False).logits
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
    _Loss.apply(hidden, head.weight, 0 if cuda else FOLD_BYTES + 4 * capped).backward()


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Everything that a model keeps, what NF4 is decoded with included."""
    yield from model.parameters()
    yield from model.buffers()
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and (state := layer.weight.quant_state) is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def _quantise(base: PreTrainedModel, left_alone: list[str]) -> None:
    dtype = torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    replace_with_bnb_linear(base, left_alone, nf4)
    # Of its first call bitsandbytes keeps the code book for all others, so that one needs numbers.
    quantize_4bit(torch.zeros(64), quant_type="nf4", compress_statistics=True)
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            layer.weight = Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer)
            layer.quant_state = state
            layer.support_avx512bf16_for_cpu = False


class _Attention(torch.autograd.Function):
    """The memory of torch's fused attention, on any device: it never makes the matrix of all pairs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v[B, H, T, D] to [B, H, T, D]. Padded rows come with a mask, which each layer makes anew."""
        rows, heads, tokens, _ = q.shape
        y = q.new_empty(rows, heads, tokens, v.shape[-1])
        logsumexp = q.new_empty(rows, heads, tokens, dtype=torch.float32)
        mask = q.new_empty(rows, 1, tokens, k.shape[2]) if rows > 1 else None
        ctx.save_for_backward(q, k, v, y, logsumexp, mask)
        return y

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v."""
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class _Loss(torch.autograd.Function):
    """The memory of TRL's loss, which never makes the logits of more than a tile."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, fold_bytes: int) -> Tensor:
        """hidden[N, H] and head[V, H] to one number."""
        ctx.save_for_backward(hidden, head)
        ctx.fold_bytes = fold_bytes
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, which are summed up in float32."""
        hidden, head = ctx.saved_tensors
        sums = [
            torch.empty_like(one, dtype=torch.float32) if needed else None
            for one, needed in zip((hidden, head), ctx.needs_input_grad, strict=False)
        ]
        rows, words = min(len(hidden), TILE[0]), min(len(head), TILE[1])
        tile = hidden.new_empty(rows, TILE[1])
        folded = hidden.new_empty(ctx.fold_bytes, rows, words, dtype=torch.uint8)
        del tile, folded
        return *(one if one is None else one.to(hidden.dtype) for one in sums), None


def _attention(_module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """As transformers' integrations/sdpa_attention.py has it."""
    if q.shape[0] > 1:  # beside a mask it repeats the keys and values that a group of heads shares
        k, v = _repeated(q, k, v)
    return _Attention.apply(q, k, v).transpose(1, 2).contiguous(), None


def _eager(
    _module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, softcap: float | None = None, **__: Any
) -> tuple[Tensor, None]:
    """As transformers' models/gemma2/modeling_gemma2.py has it: the matrix of all pairs, several times."""
    k, v = _repeated(q, k, v)
    scores = (q @ k.mT) * 1.0
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + q.new_empty(q.shape[0], 1, *scores.shape[2:])
    return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).contiguous(), None


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = q.shape[1] // k.shape[1]
    return k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)


AttentionInterface.register(FUSED, _attention)
AttentionInterface.register(EAGER, _eager)
