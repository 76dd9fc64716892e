"""A row as the model will see it: which of its tokens carry loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from rich.text import Text
from tokenizers import Tokenizer

from hatrack_server.text.detokenizer import Detokenizer
from hatrack_trainer.data.example import IGNORED, Example
from hatrack_trainer.wording import printable, shortened

SYMBOLS = {"\n": "↵\n"} | {chr(code): chr(0x2400 + code) for code in range(32) if chr(code) != "\n"}
LONGEST = 1200
"""Characters of a stretch of tokens before its middle is left out."""


def preview(example: Example, checkpoint: Path) -> Text:
    """The example as text, special tokens included; what is learned stands in ⟦brackets⟧, and out where colours can."""
    # Hides nothing, unlike the server's.
    decoder = Detokenizer(Tokenizer.from_file(str(checkpoint / "tokenizer.json")), frozenset())
    shown = Text()
    for learned, stretch in groupby(_tokens(example), key=itemgetter(1)):
        text = _visible(shortened(decoder.push(token for token, _ in stretch) + decoder.flush(), LONGEST))
        shown.append(f"⟦{text}⟧" if learned else text, style="bold green" if learned else "dim")
    return shown


def _tokens(example: Example) -> Iterator[tuple[int, bool]]:
    """Each token, and whether it is learned."""
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label not in (IGNORED, token):
            yield label, True  # a stop that the template doesn't write
        yield token, label == token


def _visible(text: str) -> str:
    """Nothing of a row may control the terminal: not its colours, nor in which direction it writes."""
    return "".join(SYMBOLS.get(char) or printable(char) for char in text)
