"""The chat template of a checkpoint: where it lies, and how it is rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from hatrack_server.errors import InvalidRequest
from hatrack_server.model.checkpoint import loading, read_json


class ChatMessage(TypedDict):
    """One message of a conversation; which roles there are, the template says."""

    role: str
    content: str


class ChatTemplate:
    """A checkpoint's own template with the special tokens that it may name. Safe to use from several threads."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, checkpoint: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate:
        """Reads `chat_template.jinja`, else the template in `tokenizer_config.json`; neither is fine too."""
        file = checkpoint / "chat_template.jinja"
        if file.is_file():
            with loading(file):
                source: str | None = file.read_text()
        else:
            with loading(checkpoint / "tokenizer_config.json"):
                source = _inline(tokenizer_config.get("chat_template"))
        return cls(source, special_tokens(tokenizer_config))

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """The conversation as one text, special tokens included.

        Raises InvalidRequest: for `chat` without a template, for `chat.messages` when the template refuses them.
        """
        if self._source is None:
            raise InvalidRequest("chat", "this model has no chat template; use prompt or token_ids")
        try:
            texts, _ = render_jinja_template(
                [list(messages)],
                chat_template=self._source,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise InvalidRequest("chat.messages", f"the chat template refuses them: {error}") from None
        except (TypeError, ValueError, KeyError, ArithmeticError):
            # Templates are programs: one that trips over a message says nothing that a user could read.
            raise InvalidRequest("chat.messages", "the chat template can't render them") from None
        return str(texts[0])


def read_tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, or nothing where a checkpoint has none."""
    file = checkpoint / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The text of each named special token, e.g. {"bos_token": "<s>"}."""
    named = {key: value for key, value in tokenizer_config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _inline(template: Any) -> str | None:
    """A template is a text, or a list of named ones, of which "default" is for plain chats."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
