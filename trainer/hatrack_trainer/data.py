"""JSON lines to token ids and labels, through the server's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatrack_server.errors import InvalidRequest
from hatrack_server.text.codec import ChatMessage, TextCodec
from hatrack_trainer.errors import DataError

IGNORED = -100
"""The label of a token that no loss is taken on."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it; both lists have the same length, and `labels` is IGNORED over the prompt."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """A file's rows in order; `truncated` of them lost their end to `max_length`."""

    examples: list[Example]
    truncated: int


def stop_token_ids(checkpoint: Path) -> list[int]:
    """The ids that end a completion when served, the one to learn first; from generation_config.json or config.json.

    Raises DataError when the checkpoint names none.
    """
    for name in ("generation_config.json", "config.json"):
        file = checkpoint / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    raise DataError("the base names no eos_token_id: an adapter could never learn to stop")


def check_data_file(path: Path) -> None:
    """Raises DataError when the file can't be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error}") from None


def read_examples(path: Path, codec: TextCodec, stop_ids: Sequence[int], max_length: int) -> ExampleSet:
    """Reads a JSONL file. Every completion ends with a stop id, whose label counts; the prompt's labels don't.

    Raises DataError, naming file, line and field, for the first wrong row, and for a row whose prompt alone fills
    `max_length`: nothing of its completion would be learned.
    """
    try:
        # With or without a byte-order mark; and `splitlines` would cut at U+2028, too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None
    examples, truncated = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt, completion = _tokenise(_parse(line), codec, stop_ids)
            if len(prompt) >= max_length:
                raise DataError(f"the prompt's {len(prompt)} tokens leave nothing of the completion in {max_length=}")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        truncated += len(prompt) + len(completion) > max_length
        labels = [IGNORED] * len(prompt) + completion
        examples.append(Example((prompt + completion)[:max_length], labels[:max_length]))
    if not examples:
        raise DataError(f"{path}: holds no rows")
    return ExampleSet(examples, truncated)


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError("must be a JSON object")
    return row


def _tokenise(row: dict[str, Any], codec: TextCodec, stop_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The row's prompt and completion as token ids, the prompt exactly as the server would tokenise it."""
    if "messages" in row and ("prompt" in row or "completion" in row):
        raise DataError("must have either messages, or prompt and completion, not both")
    if "messages" in row:
        return _tokenise_chat(_messages(row["messages"]), codec, stop_ids)
    if "prompt" not in row and "completion" not in row:
        raise DataError("must have either messages, or prompt and completion")
    text, answer = _text(row, "prompt"), _text(row, "completion")
    prompt, whole = codec.encode(text), codec.encode(text + answer)
    if whole[: len(prompt)] == prompt:
        return prompt, [*whole[len(prompt) :], stop_ids[0]]
    # A token spans the border. Served, the model continues the prompt's own tokens: so cut there.
    return prompt, [*codec.encode(answer)[len(codec.encode("")) :], stop_ids[0]]


def _tokenise_chat(
    messages: list[ChatMessage], codec: TextCodec, stop_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    try:
        prompt = codec.encode_chat(messages[:-1], add_generation_prompt=True)
        whole = codec.encode_chat(messages, add_generation_prompt=False)
    except InvalidRequest as error:
        raise DataError(f"messages: {error.message}") from None
    if whole[: len(prompt)] != prompt:
        raise DataError("messages: the chat template writes the last turn otherwise than it asks for one")
    completion = whole[len(prompt) :]
    # Templates end a turn with a stop token and often a line break; nothing after the stop is ever generated.
    for position, token in enumerate(completion):
        if token in stop_ids:
            return prompt, completion[: position + 1]
    return prompt, [*completion, stop_ids[0]]


def _messages(raw: object) -> list[ChatMessage]:
    if not isinstance(raw, list) or len(raw) < 2:
        raise DataError("messages: must be a list of at least two")
    messages: list[ChatMessage] = []
    for index, item in enumerate(raw):
        if not isinstance(item, dict):
            raise DataError(f"messages[{index}]: must be an object")
        prefix = f"messages[{index}]."
        messages.append({"role": _text(item, "role", prefix), "content": _text(item, "content", prefix)})
    if messages[-1]["role"] != "assistant":
        raise DataError("messages: the last one must be the assistant's")
    return messages


def _text(row: dict[str, Any], field: str, prefix: str = "") -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise DataError(f"{prefix}{field}: missing or not text")
    # The prompt alone may be empty: an adapter may learn to write unasked.
    if not value and field != "prompt":
        raise DataError(f"{prefix}{field}: is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{prefix}{field}: holds half of a surrogate pair") from None
    return value
