"""Targets to token ids and labels, through the server's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hatrack_server.errors import InvalidRequest
from hatrack_server.model.checkpoint import eos_token_ids
from hatrack_server.text.codec import ChatMessage, TextCodec
from hatrack_trainer.data.example import IGNORED, Example
from hatrack_trainer.data.formats import Completion, Conversation, Document, Target, Turn
from hatrack_trainer.data.problems import Flaw, WrongRow
from hatrack_trainer.errors import DataError

Loss = Literal["completion", "assistant"]
"""Which turns of a chat are learned: the last alone, or every one of the assistant's."""

CHARACTERS = 8
"""More than a token of most texts has."""


def stop_token_ids(checkpoint: Path) -> list[int]:
    """The ids that end a completion when served, the one to learn first.

    Raises DataError when the checkpoint names none, StartupError for one that is wrong.
    """
    if ids := eos_token_ids(checkpoint):
        return ids
    raise DataError("the base names no eos_token_id: an adapter could never learn to stop")


@dataclass(frozen=True, slots=True)
class _Answer:
    """An assistant's turn in the ids of its conversation up to there, stop included if the template writes one."""

    ids: list[int]
    start: int
    stopped: bool


class TargetTokenizer:
    """Tokenises what is to be learned; prompts are what the server would make of them, and every target ends in a stop.

    Its methods raise WrongRow for what can't be learned, and DataError for what the base lacks.
    """

    def __init__(self, codec: TextCodec, stop_ids: Sequence[int], loss: Loss = "completion") -> None:
        self._codec = codec
        self._stop_ids = tuple(stop_ids)
        self._loss = loss

    def tokenise(self, target: Target) -> Example:
        """The whole target, however long.

        No beginning stands for it: its last tokens may depend on all that follows (BPE and Unigram merge whole texts
        where nothing splits them), and a stop that is spelled far behind the cut is a flaw of the row.
        """
        match target:
            case Completion():
                return self._completion(target)
            case Conversation():
                return self._conversation(target.turns)
            case Document():
                ids = self._end(self._codec.encode(target.text))
                # Nothing comes before the first token for it to be guessed from.
                return Example(ids, [IGNORED, *ids[1:]])

    def exceeds(self, target: Target, tokens: int) -> bool:
        """Whether what comes before the first learned token surely has more tokens, without tokenising all of it.

        Told from its beginning: each of its tokens stands for at least one character, and none of the whole text's for
        more than the vocabulary's longest. False says nothing.
        """
        most = self._codec.longest_token * tokens
        enough = CHARACTERS * most
        match target:
            case Completion():
                prompt = target.prompt
            case Conversation(turns) if sum(len(turn.content) for turn in turns) > enough:
                prompt = self._asked(turns)
            case _:
                return False
        return len(prompt) > enough and len(self._codec.encode(prompt[:enough])) > most

    def _asked(self, turns: list[Turn]) -> str:
        """What comes before the first learned turn."""
        answers = (place for place, turn in enumerate(turns) if turn.role == "assistant")
        first = next(answers) if self._loss == "assistant" else len(turns) - 1
        with _template_errors():
            return self._codec.render_chat(_messages(turns[:first]))

    def _completion(self, target: Completion) -> Example:
        prompt, whole = self._codec.encode(target.prompt), self._codec.encode(target.prompt + target.completion)
        if not prompt:
            raise WrongRow(Flaw("prompt", "is empty, and the base has no start token to go on from"))
        # If a token spans the border: served, the model continues the prompt's own tokens, so cut there.
        fits = whole[: len(prompt)] == prompt
        answer = self._end(whole[len(prompt) :] if fits else self._continue(prompt, whole, target))
        if self._stop(answer) != len(answer) - 1:
            raise _stops_early(target.field)
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer)

    def _continue(self, prompt: list[int], whole: list[int], target: Completion) -> list[int]:
        """The completion's ids behind the prompt's; many tokenizers put a space before a text unless something is."""
        text = self._codec.decode(whole)
        for before in ("", "\n"):
            ids = self._ids_behind(before, target.completion)
            if self._codec.decode(prompt + ids) == text:
                return ids
        raise WrongRow(Flaw(target.field, "its first token would reach into the prompt: begin it with a space"))

    def _conversation(self, turns: list[Turn]) -> Example:
        last = self._answer(turns)
        ids = last.ids if last.stopped else [*last.ids, self._stop_ids[0]]
        labels = [IGNORED] * len(ids)
        for answer in [*self._earlier(turns), last]:
            end = len(answer.ids)
            if ids[:end] != answer.ids:
                raise WrongRow(
                    Flaw("messages", "the template rewrites answers once turns follow: set data.loss to completion")
                )
            labels[answer.start : end] = ids[answer.start : end]
            if not answer.stopped:
                labels[end] = self._stop_ids[0]
        return Example(ids, labels)

    def _earlier(self, turns: list[Turn]) -> list[_Answer]:
        if self._loss == "completion":
            return []
        return [self._answer(turns[: i + 1]) for i, turn in enumerate(turns[:-1]) if turn.role == "assistant"]

    def _answer(self, turns: list[Turn]) -> _Answer:
        """The last turn, as the model is asked for it. Templates end a turn with a stop, and often a line break."""
        prompt = self._render(turns[:-1], add_generation_prompt=True)
        ids = self._render(turns, add_generation_prompt=False)
        if ids[: len(prompt)] != prompt:
            raise WrongRow(Flaw("messages", "the chat template writes an answer otherwise than it asks for one"))
        content = self._ids_behind("", turns[-1].content)
        if self._stop(content[:-1]) is not None:
            raise _stops_early(turns[-1].field)
        stop = self._stop(ids[len(prompt) :])
        # Nothing after the stop is ever generated.
        return _Answer(ids if stop is None else ids[: len(prompt) + stop + 1], len(prompt), stop is not None)

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> list[int]:
        with _template_errors():
            return self._codec.encode_chat(_messages(turns), add_generation_prompt=add_generation_prompt)

    def _ids_behind(self, before: str, text: str) -> list[int]:
        """The text's ids as they stand behind another text, without the tokens that open every text."""
        opening, ids = self._codec.encode(before), self._codec.encode(before + text)
        differ = (place for place, pair in enumerate(zip(opening, ids, strict=False)) if pair[0] != pair[1])
        return ids[next(differ, len(opening)) :]

    def _stop(self, ids: Sequence[int]) -> int | None:
        """Where the first stop is."""
        return next((place for place, token in enumerate(ids) if token in self._stop_ids), None)

    def _end(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] in self._stop_ids else [*ids, self._stop_ids[0]]


def _messages(turns: Sequence[Turn]) -> list[ChatMessage]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        if error.field == "chat":
            raise DataError("the base has no chat template: write prompt and completion instead") from None
        raise WrongRow(Flaw("messages", " ".join(error.message.split()))) from None


def _stops_early(field: str) -> WrongRow:
    return WrongRow(Flaw(field, "spells the base's stop token: what follows it would never be generated"))
