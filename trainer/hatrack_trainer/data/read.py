"""Files of rows to examples: all or nothing, with everything that is wrong in one list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hatrack_server.text.codec import TextCodec
from hatrack_trainer.config import DataSection
from hatrack_trainer.data.detect import FileFormat, detect
from hatrack_trainer.data.example import Example
from hatrack_trainer.data.lines import Line, read_lines
from hatrack_trainer.data.problems import Flaw, InvalidData, Problem, WrongRow, quoted
from hatrack_trainer.data.tokens import Loss, TargetTokenizer, stop_token_ids
from hatrack_trainer.errors import DataError
from hatrack_trainer.wording import some

KEYS = 20
"""How many keys of a row are named before the rest is counted."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line and what is learned from it."""

    line: Line
    example: Example  # at most max_length tokens
    length: int  # tokens before the cut

    @property
    def truncated(self) -> bool:
        """Whether it lost its end to max_length."""
        return len(self.example.input_ids) < self.length


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """A file's examples in order; a preference pair makes two, the chosen and then the rejected."""

    file: Path
    format: FileFormat
    entries: list[Entry]

    @property
    def examples(self) -> list[Example]:
        """What is learned."""
        return [entry.example for entry in self.entries]

    @property
    def pairs(self) -> bool:
        """Whether its rows are preferences."""
        return self.format.name == "preference"

    @property
    def lines(self) -> list[Line]:
        """The rows, each once."""
        return list({entry.line.number: entry.line for entry in self.entries}.values())

    @property
    def truncated(self) -> list[Line]:
        """The rows that lost their end."""
        cut = {entry.line.number for entry in self.entries if entry.truncated}
        return [line for line in self.lines if line.number in cut]


@dataclass(frozen=True, slots=True)
class Data:
    """All rows of a run."""

    train: ExampleSet
    held_out: ExampleSet | None

    @property
    def files(self) -> list[ExampleSet]:
        """One, or both."""
        return [self.train] if self.held_out is None else [self.train, self.held_out]


def read_data(section: DataSection, checkpoint: Path) -> Data:
    """Reads the files that a configuration names; of the checkpoint it needs configuration, tokenizer and template.

    Raises InvalidData with every problem of both files, and DataError when they don't go together, or when the base
    lacks a stop token or a template; StartupError for a broken file of the base.
    """
    tokenizer = TargetTokenizer(TextCodec(checkpoint), stop_token_ids(checkpoint), section.loss)
    found: list[ExampleSet] = []
    problems: list[Problem] = []
    for file in filter(None, (section.train, section.eval)):
        try:
            found.append(read_examples(file, tokenizer, section.max_length, section.format))
        except InvalidData as error:
            problems += error.problems
    if problems:
        raise InvalidData(problems)
    _check_alike(found, section.loss)
    return Data(found[0], found[1] if section.eval else None)


def read_examples(file: Path, tokenizer: TargetTokenizer, max_length: int, format_name: str = "auto") -> ExampleSet:
    """Reads one JSONL file. Every target ends in a stop, which is learned unless `max_length` cuts it off.

    Raises InvalidData with every problem of the file, and DataError when the base lacks a template that is needed.
    """
    lines, problems = read_lines(file)
    file_format = _format(file, lines, problems, format_name)
    entries: list[Entry] = []
    for line in lines:
        try:
            entries += _entries(line, file_format, tokenizer, max_length)
        except WrongRow as error:
            problems += [Problem(file, flaw.what, line.number, flaw.field) for flaw in error.flaws]
    if problems:
        raise InvalidData(sorted(problems, key=lambda problem: problem.line or 0))
    return ExampleSet(file, file_format, entries)


def _check_alike(files: Sequence[ExampleSet], loss: Loss) -> None:
    """Raises DataError for preference pairs beside other rows, or where more than the last answers would be learned."""
    if len({part.pairs for part in files}) > 1:
        raise DataError(f"{files[0].file} and {files[1].file}: preference pairs and other rows can't share a run")
    if files[0].pairs and loss == "assistant":
        raise DataError(f"{files[0].file}: preference pairs are compared by their last answers: leave out data.loss")


def _format(file: Path, lines: Sequence[Line], problems: Sequence[Problem], name: str) -> FileFormat:
    if not lines:
        raise InvalidData(problems)
    found = detect(lines) if name == "auto" else FileFormat(name)
    if found is None:
        keys = some([*map(quoted, lines[0].row)], KEYS) or "no keys"
        raise InvalidData([Problem(file, f"has {keys}: no format that is known", lines[0].number), *problems])
    return found


def _entries(line: Line, file_format: FileFormat, tokenizer: TargetTokenizer, max_length: int) -> list[Entry]:
    targets = file_format.parse(line.row)
    if any(tokenizer.exceeds(target, max_length) for target in targets):  # of megabytes, which take minutes
        raise WrongRow(Flaw("", f"the prompt leaves nothing of the completion in {max_length=}"))
    wholes = [tokenizer.tokenise(target) for target in targets]
    if len(wholes) == 2:
        _check_pair(wholes[0], wholes[1], max_length)
    return [Entry(line, _cut(whole, max_length), len(whole.input_ids)) for whole in wholes]


def _check_pair(chosen: Example, rejected: Example, max_length: int) -> None:
    """A pair is compared by what answers the same prompt, up to and with the stop."""
    if chosen == rejected:
        raise WrongRow(Flaw("rejected", "is the same as chosen"))
    if chosen.input_ids[: chosen.start] != rejected.input_ids[: rejected.start]:
        raise WrongRow(Flaw("rejected", "must differ from chosen in the last message alone"))
    for field, whole in (("chosen", chosen), ("rejected", rejected)):
        length = len(whole.input_ids)
        if length > max_length:
            raise WrongRow(Flaw(field, f"its {length} tokens, with the prompt's, are more than {max_length=}"))


def _cut(whole: Example, max_length: int) -> Example:
    if not whole.learned:
        raise WrongRow(Flaw("", "no token of it can be learned"))
    if whole.start >= max_length:
        raise WrongRow(Flaw("", f"the prompt's {whole.start} tokens leave nothing of the completion in {max_length=}"))
    return whole.cut(max_length)
