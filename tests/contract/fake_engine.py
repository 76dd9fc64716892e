"""EngineClient's surface without a model: it spells a script out, token by token, and can be told to misbehave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hatrack.manifest import BaseIdentity
from hatrack_server.errors import Unavailable
from hatrack_server.types import (
    Artifact,
    BaseInfo,
    BaseShapes,
    Delta,
    FinishReason,
    LinearShape,
    Sampling,
    TokenLogprobs,
)

BOS, EOS = 256, 257
BASE = BaseInfo(
    identity=BaseIdentity("w" * 64, "nf4-double-64", "t" * 64, "c" * 64),
    architecture="LlamaForCausalLM",
    shapes=BaseShapes({"model.layers.0.self_attn.q_proj": LinearShape(8, 8)}, "model.embed_tokens", 8, ()),
    vocab_size=320,
    max_model_len=512,
    kv_tokens=400,
    eos_token_ids=frozenset({EOS}),
    memory={"weights": 1},
    adapter_bytes=10**9,
    device="cpu",
)


@dataclass
class FakeEngine:
    """Each generation yields `script` as deltas, each with its tokens, then ends as `sampling` says."""

    script: list[list[int]] = field(default_factory=lambda: [[1], [2], [3]])
    finish: FinishReason = FinishReason.LENGTH
    error: Exception | None = None  # raised before the first delta
    late_error: Exception | None = None  # raised after the last one
    stall: bool = False  # never ends after the script
    ready: bool = True
    loaded: BaseInfo | None = BASE
    calls: list[dict[str, Any]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    in_flight: int = 0

    @property
    def base(self) -> BaseInfo:
        if self.loaded is None:
            raise Unavailable("the engine is starting")
        return self.loaded

    async def generate(
        self,
        *,
        tenant: str,
        salt: bytes,
        artifact: Artifact | None,
        prompt: tuple[int, ...],
        sampling: Sampling,
        deadline: float | None = None,
        trial: bool = False,
    ) -> AsyncIterator[Delta]:
        self.calls.append(
            {"tenant": tenant, "salt": salt, "artifact": artifact, "prompt": prompt, "sampling": sampling}
        )
        assert deadline is None or deadline > time.monotonic()
        if self.error is not None:
            raise self.error
        with self._counted():
            for i, tokens in enumerate(self.script):
                last = i == len(self.script) - 1 and not self.stall and self.late_error is None
                finish = self.finish if last else None
                yield Delta(len(self.calls), tuple(tokens), self._logprobs(tokens, sampling), finish, None, 2, 0.25)
                await asyncio.sleep(0)
            if self.late_error is not None:
                raise self.late_error
            if self.stall:
                await asyncio.Event().wait()

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    def spell(self, *deltas: str, finish: FinishReason = FinishReason.LENGTH) -> None:
        """Makes the script from texts, in the byte tokens of tests/tiny.py."""
        from tiny import make_tokenizer

        tokenizer = make_tokenizer()
        self.script = [tokenizer.encode(text, add_special_tokens=False) for text in deltas]
        self.finish = finish

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @staticmethod
    def _logprobs(tokens: list[int], sampling: Sampling) -> tuple[TokenLogprobs, ...]:
        if sampling.logprobs is None:
            return ()
        top = tuple((token, -0.5 - token) for token in range(sampling.logprobs))
        return tuple(TokenLogprobs(-0.5, top) for _ in tokens)
