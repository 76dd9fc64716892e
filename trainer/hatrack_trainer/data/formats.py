"""The formats that a row can have, and what each asks the model to learn.

They are those of TRL's dataset guide, of Stanford Alpaca (Taori et al. 2023) and of ShareGPT.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hatrack_trainer.data.problems import nearest, quoted

ROLES = ("system", "developer", "user", "assistant", "tool")
SENDERS = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model says to a prompt; `field` is where the row has it."""

    prompt: str
    completion: str
    field: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; `field` is where the row has its text."""

    role: str
    content: str
    field: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the assistant says in a chat; the last turn is the assistant's."""

    turns: list[Turn]


@dataclass(frozen=True, slots=True)
class Document:
    """Text to go on writing."""

    text: str


Target = Completion | Conversation | Document


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None
    return text


def _written(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def _one_of(words: Collection[str], word: str) -> str:
    if word in words:
        return word
    near = nearest(word, words)
    raise ValueError(quoted(word) + (f" (did you mean {quoted(near)}?)" if near else f" is none of {', '.join(words)}"))


def _answered(messages: list[Any]) -> list[Any]:
    if not messages or messages[-1].role != "assistant":
        raise ValueError("the last one must be the assistant's")
    return messages


def _exchange(messages: list[Any]) -> list[Any]:
    if len(messages) < 2:
        raise ValueError("must hold at least two messages")
    return _answered(messages)


AnyText = Annotated[str, AfterValidator(_encodable)]
Text = Annotated[AnyText, AfterValidator(_written)]
Role = Annotated[AnyText, AfterValidator(lambda role: _one_of(ROLES, role))]
Sender = Annotated[AnyText, AfterValidator(lambda sender: _one_of(SENDERS, sender))]


class JsonObject(BaseModel):
    """What a row and its messages share: text is text, and keys of other tools may be there."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Message(JsonObject):
    """A message as OpenAI has it."""

    role: Role
    content: Text

    def turn(self, field: str) -> Turn:
        """The message at `field` of its row."""
        return Turn(self.role, self.content, f"{field}.content")


class SharedMessage(JsonObject):
    """A message as ShareGPT has it."""

    sender: Sender = Field(alias="from")
    value: Text

    @property
    def role(self) -> str:
        """The sender as a chat template knows it."""
        return SENDERS[self.sender]

    def turn(self, field: str) -> Turn:
        """The message at `field` of its row."""
        return Turn(self.role, self.value, f"{field}.value")


class Row(JsonObject):
    """A row of a known format."""

    @abstractmethod
    def targets(self) -> list[Target]:
        """What is to be learned; of a preference pair, the chosen and then the rejected."""


class PromptCompletion(Row):
    """A text and how it goes on. The prompt may be empty: an adapter may learn to write unasked."""

    prompt: AnyText
    completion: Text

    def targets(self) -> list[Target]:
        """The completion."""
        return [Completion(self.prompt, self.completion, "completion")]


class Chat(Row):
    """A conversation."""

    messages: Annotated[list[Message], AfterValidator(_exchange)]

    def targets(self) -> list[Target]:
        """The conversation."""
        return [Conversation(_turns("messages", self.messages))]


class Alpaca(Row):
    """An instruction, perhaps with an input, and the answer.

    Learned as a chat, for a chat is what a user of the adapter sends; Alpaca's own wording would have to be sent, too.
    """

    instruction: Text
    input: AnyText | None = None
    output: Text

    def targets(self) -> list[Target]:
        """A conversation of two turns."""
        question = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return [Conversation([Turn("user", question, "instruction"), Turn("assistant", self.output, "output")])]


class ShareGpt(Row):
    """A conversation in ShareGPT's words."""

    conversations: Annotated[list[SharedMessage], AfterValidator(_exchange)]

    def targets(self) -> list[Target]:
        """The conversation."""
        return [Conversation(_turns("conversations", self.conversations))]


class RawText(Row):
    """A document."""

    text: Text

    def targets(self) -> list[Target]:
        """The document."""
        return [Document(self.text)]


class Preference(Row):
    """A prompt with a better and a worse completion."""

    prompt: AnyText
    chosen: Text
    rejected: Text

    def targets(self) -> list[Target]:
        """Both completions."""
        ends = (self.chosen, "chosen"), (self.rejected, "rejected")
        return [Completion(self.prompt, text, field) for text, field in ends]


class ChatPreference(Row):
    """A conversation with a better and a worse end."""

    prompt: list[Message]
    chosen: Annotated[list[Message], AfterValidator(_answered)]
    rejected: Annotated[list[Message], AfterValidator(_answered)]

    def targets(self) -> list[Target]:
        """Both conversations."""
        ends = _turns("chosen", self.chosen), _turns("rejected", self.rejected)
        return [Conversation(_turns("prompt", self.prompt) + end) for end in ends]


def _turns(field: str, messages: Sequence[Message | SharedMessage]) -> list[Turn]:
    return [message.turn(f"{field}[{index}]") for index, message in enumerate(messages)]
