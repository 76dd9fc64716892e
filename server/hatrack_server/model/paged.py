"""The base as the engine uses it: loaded, wrapped, probed, with its pool of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from hatrack_server.config import EngineConfig
from hatrack_server.errors import StartupError
from hatrack_server.kernels.native import native
from hatrack_server.kernels.nf4_linear import nf4_tensors
from hatrack_server.kernels.transfer import to_device
from hatrack_server.model.attention import NAME, PAGED, PagedKV, StepCache
from hatrack_server.model.batch import Batch
from hatrack_server.model.checkpoint import eos_token_ids
from hatrack_server.model.layers import FrozenLayers, squared_norms
from hatrack_server.model.load import load_base, read_config
from hatrack_server.model.probe import probe, refuse_unservable
from hatrack_server.model.shapes import attention_modules, base_shapes, kv_shapes
from hatrack_server.model.wrap import Effect, Effects, pack_linears, wrap_embedding, wrap_linears, wrap_norms

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


class PagedModel:
    """A causal LM that computes ragged batches over a paged KV pool.

    layers: where adapters may act. head: the linear one, if any, that sees each chunk's last token only.
    kv_slots: tokens that the pool holds, its zero block included. eos_token_ids: see `model.checkpoint`.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[str, float], None] = lambda *_: None) -> None:
        """Loads and checks the base; raises StartupError when it can't be served right."""
        self.device = torch.device(_device(config.device))
        if self.device.type == "cpu":
            native()  # compiled now, not in the first step
        refuse_unservable(read_config(config.model))
        self.eos_token_ids = frozenset(eos_token_ids(config.model))  # transformers would pass over a broken file
        progress("loading weights", 0.0)
        self._model = load_base(
            config.model,
            quantization=config.quantization,
            dtype=DTYPES[config.dtype],
            device=str(self.device),
            attn_implementation=PAGED,
        )
        self.config: PretrainedConfig = self._model.config.get_text_config()
        self.dtype: torch.dtype = self._model.dtype
        self.block_size = config.block_size
        self._effects = Effects()
        attention = attention_modules(self._model)
        for name, module in attention.items():
            module.__dict__[NAME] = name  # by which `paged_attention` finds the effect of a step
        self._attention_layers = {name: layer for layer, name in enumerate(attention)}
        linears = wrap_linears(self._model, self._effects)
        row_norms = squared_norms(linears)
        layouts = pack_linears(self._model) if config.packed else linears
        cache = self._cache_of_a_pass()
        shapes = base_shapes(self._model, linears, attention, cache)
        embedding = wrap_embedding(self._model, shapes.embedding, self._effects)
        offsets = wrap_norms(self._model, sorted(shapes.replaceable.keys() - shapes.ends), self._effects)
        ends: dict[str, nn.Module] = {shapes.embedding: embedding}
        if shapes.head:
            ends[shapes.head] = linears[shapes.head]
        self.layers = FrozenLayers(shapes, layouts, row_norms, ends, offsets)
        self.head = shapes.head
        progress("allocating the KV cache", 0.6)
        kv = kv_shapes(cache)
        self._bytes_per_token = sum(heads * (k + v) for heads, k, v in kv) * self.dtype.itemsize
        blocks = int(config.kv_cache_gb * 1e9 / (self._bytes_per_token * config.block_size))
        if blocks < 2:
            raise StartupError(
                f"kv_cache_gb: {config.kv_cache_gb} holds less than one block of {config.block_size} tokens"
            )
        self.kv_slots = (blocks + 1) * config.block_size  # one more for the zeros that padding points at
        try:
            self._kv = PagedKV(kv, self.kv_slots, self.dtype, self.device)
        except (MemoryError, RuntimeError):  # torch's own out-of-memory errors are RuntimeErrors
            raise StartupError(f"kv_cache_gb: {config.kv_cache_gb} is more memory than there is") from None
        progress("checking attention", 0.8)
        probe(self)

    @property
    def architecture(self) -> str:
        """E.g. "LlamaForCausalLM"."""
        return type(self._model).__name__

    @property
    def max_position(self) -> int:
        """The longest context that the checkpoint claims, in tokens."""
        return int(self.config.max_position_embeddings)

    def write_kv(self, attention: str, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts ready keys and values [n, kv_heads, dim] of one attention layer at slots[n] of the pool."""
        layer = self._attention_layers[attention]
        slots = to_device(slots, self.device)
        self._kv.keys[layer][slots] = keys.to(self.dtype)
        self._kv.values[layer][slots] = values.to(self.dtype)

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for."""
        tensors = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}.values()
        quantized = {id(tensor): tensor for layer in self._model.modules() for tensor in nf4_tensors(layer)}
        return {
            "NF4 weights": sum(tensor.nbytes for tensor in quantized.values()),
            "other weights": sum(tensor.nbytes for tensor in tensors if id(tensor) not in quantized),
            "KV cache": self.kv_slots * self._bytes_per_token,
        }

    @torch.inference_mode()
    def forward(self, batch: Batch, effects: Mapping[str, Effect] | None = None) -> Tensor:
        """One pass over the batch's tokens: logits [chunks, vocab] of each chunk's last token. Writes the KV pool."""
        self._effects.by_module = effects or {}
        try:
            out = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                past_key_values=StepCache(self._kv, batch.write_slots),
                use_cache=True,
                logits_to_keep=batch.last_tokens,
                hatrack=batch,
                hatrack_kv=self._kv,
                hatrack_effects=self._effects.by_module,
            )
        finally:
            self._effects.by_module = {}
        return out.logits[0]

    @torch.inference_mode()
    def eager_logits(self, ids: Tensor) -> Tensor:
        """transformers' own attention on ids[T], without the pool: float32 logits [1, vocab] of the last token."""
        return self._eagerly(ids, None)

    @contextmanager
    def narrow_windows(self, tokens: int) -> Iterator[None]:
        """Makes every sliding window at most so many tokens, and gives it its own width back."""
        # Some modelling code reads the configuration at every pass, some what a layer took from it when it was made.
        holders = [h for h in (self.config, *self._model.modules()) if getattr(h, "sliding_window", None)]
        widths = [h.sliding_window for h in holders]
        for holder, width in zip(holders, widths, strict=True):
            holder.sliding_window = min(width, tokens)
        try:
            yield
        finally:
            for holder, width in zip(holders, widths, strict=True):
                holder.sliding_window = width

    def check_device(self) -> None:
        """Raises RuntimeError when the base computes nothing any more, or nothing finite."""
        if not self._eagerly(torch.tensor([0]), None).isfinite().any():
            raise RuntimeError("the base gives nothing that is finite")

    def clear_kv(self) -> None:
        """Zeroes the whole pool."""
        for pool in (*self._kv.keys, *self._kv.values):
            pool.zero_()

    def _cache_of_a_pass(self) -> DynamicCache:
        """What the model puts into transformers' own cache: keys and values as it really makes them."""
        cache = DynamicCache()
        try:
            self._eagerly(torch.tensor([0, 1]), cache)
        except TypeError:  # its layers hold on to the attention that they were made with
            raise StartupError(f"{self.config.model_type} can't be served: its attention can't be exchanged") from None
        if len(cache.layers) != self.config.num_hidden_layers:
            raise StartupError(f"{self.config.model_type} can't be served: its layers share keys and values")
        return cache

    @torch.inference_mode()
    def _eagerly(self, ids: Tensor, cache: DynamicCache | None) -> Tensor:
        self._model.set_attn_implementation("eager")
        try:
            out = self._model(
                ids[None].to(self.device), past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
            )
        finally:
            self._model.set_attn_implementation(PAGED)
        return out.logits[0].float()


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("device: cuda was asked for, and none is available")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
