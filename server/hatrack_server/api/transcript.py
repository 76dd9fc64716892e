"""One completion's tokens, read as text: whole characters, up to the first stop."""

from __future__ import annotations

from dataclasses import dataclass

from hatrack_server.text.detokenizer import Detokenizer
from hatrack_server.text.stops import StopStrings
from hatrack_server.types import Delta, FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta adds to a completion; its text may come later than its tokens."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Transcript:
    """Reads a completion token by token, so that its end doesn't depend on how the engine put tokens into deltas."""

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings, *, min_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self.token_count = 0
        self.finish: FinishReason | None = None

    def add(self, delta: Delta) -> Piece:
        """The next piece; sets `finish` when the completion ends with it, after which nothing may be added."""
        text, used = "", 0
        for token in delta.tokens:
            used += 1
            # The token that ended the completion is counted and returned, but is not part of the text.
            if delta.finish is FinishReason.STOP and used == len(delta.tokens):
                break
            text += self._read(self._detokenizer.push((token,)), self.token_count + used)
            if self.finish is not None:
                break
        self.token_count += used
        if self.finish is None and delta.finish is not None:
            text += self._end(delta.finish)
        return Piece(text, delta.tokens[:used], delta.logprobs[:used])

    def _read(self, text: str, position: int) -> str:
        if position <= self._min_tokens:
            return text
        emitted, stopped = self._stops.push(text)
        if stopped:
            self.finish = FinishReason.STOP
        return emitted

    def _end(self, finish: FinishReason) -> str:
        rest = self._read(self._detokenizer.flush(), self.token_count + 1)
        if self.finish is None:
            rest += self._stops.flush()
            self.finish = finish
        return rest
