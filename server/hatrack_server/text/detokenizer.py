"""Token ids to text while they come: never half a character, and never more work than a short window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

# What a decoder shows for bytes that are no character, or not yet one.
REPLACEMENT = "\ufffd"
# A character has at most four bytes, hence four tokens; more that still show no character are not becoming one.
MAX_PENDING = 8
PROMPT_WINDOW = 8


class Detokenizer:
    """Decodes one completion.

    `context` holds tokens whose text is out already: sentencepiece drops the space before a text's first token, so a
    token is decoded behind its predecessors and only what it adds is emitted. `pending` holds tokens that end inside
    a character. The pieces together equal the decoded whole, wherever the tokens were split.
    """

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int], prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._context: list[int] = []
        self._pending: list[int] = []
        self._start_behind([token for token in prompt[-PROMPT_WINDOW:] if self._visible(token)])

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return "".join(self._push_one(token) for token in ids if self._visible(token))

    def flush(self) -> str:
        """What is left at the end; a character that never became whole shows as U+FFFD."""
        return self._emit(len(self._pending))

    def _push_one(self, token: int) -> str:
        self._pending.append(token)
        if not self._decode(self._context + self._pending).endswith(REPLACEMENT):
            return self._emit(len(self._pending))
        return "" if len(self._pending) < MAX_PENDING else self._emit(self._boundary())

    def _emit(self, count: int) -> str:
        """Moves the first `count` pending tokens to the context; returns the text that they add to it."""
        known, tokens = self._decode(self._context), self._pending[:count]
        text = self._decode(self._context + tokens)
        if tokens:
            self._context, self._pending = tokens, self._pending[count:]
        return text[len(known) :]

    def _boundary(self) -> int:
        """How many pending tokens surely end between characters: there both halves decode as the whole does."""
        whole, count = self._decode(self._pending), len(self._pending)
        cuts = range(count - 1, count - 5, -1)
        halves = ((cut, self._decode(self._pending[:cut]) + self._decode(self._pending[cut:])) for cut in cuts)
        return next((cut for cut, text in halves if text == whole), count)

    def _start_behind(self, prompt: list[int]) -> None:
        # The window may cut the prompt's first character in two.
        while self._decode(prompt).startswith(REPLACEMENT):
            prompt = prompt[1:]
        self._context = prompt

    def _visible(self, token: int) -> bool:
        # A model's vocabulary may be padded beyond its tokenizer's.
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text
