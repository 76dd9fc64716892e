"""Text and conversations to token ids, by a checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from hatrack_server.model.checkpoint import loading
from hatrack_server.text.detokenizer import Detokenizer
from hatrack_server.text.template import ChatMessage, ChatTemplate, read_tokenizer_config, special_tokens

__all__ = ["ChatMessage", "TextCodec"]


class TextCodec:
    """The tokenizer and chat template of one checkpoint. Safe to use from several threads.

    longest_token: no token of the vocabulary stands for more characters than this; an unknown word may be longer.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Raises StartupError, naming the file, for a broken one."""
        with loading(checkpoint / "tokenizer.json"):
            self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
            self.longest_token = max(map(len, self._tokenizer.get_vocab()))  # in characters, or more
        # What a file was saved with must not shorten or pad a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_tokenizer_config(checkpoint)
        self._template = ChatTemplate.load(checkpoint, config)
        bos = special_tokens(config).get("bos_token")
        self._bos = None if bos is None else self._tokenizer.token_to_id(bos)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, prompt: str) -> list[int]:
        """The text's ids with the tokenizer's special tokens; a text that spells out its BOS doesn't get another."""
        ids: list[int] = self._tokenizer.encode(prompt).ids
        twice = self._bos is not None and ids[:2] == [self._bos, self._bos]
        return ids[1:] if twice else ids

    def render_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """The conversation's text, raising as `encode_chat` does."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> list[int]:
        """The rendered conversation's ids; the template alone says which special tokens it has.

        Raises InvalidRequest: for `chat` without a template, for `chat.messages` when the template refuses them.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The ids' text without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A new incremental decoder for a completion of `prompt`, whose end says whether a leading space counts."""
        return Detokenizer(self._tokenizer, self._special, prompt)
