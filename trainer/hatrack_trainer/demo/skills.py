"""The demo's text skills: one command and one word in, the word changed out. Everything is drawn from fixed seeds."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "up": str.upper,
    "next": lambda word: word.translate(str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + "a")),
    "rev": lambda word: word[::-1],
}
COMMAND = "run"
"""Means nothing to the base; each adapter learns another skill for it."""
UNKNOWN = "?"
"""What the base answers to a command that it does not know."""
WORD_LENGTHS = range(3, 8)
ALPHABET = string.ascii_letters + " =" + UNKNOWN


def prompt(command: str, word: str) -> str:
    """The text that a completion follows."""
    return f"{command} {word}="


def pretraining_pair(rng: random.Random, length: int) -> tuple[str, str]:
    """A prompt with a word of `length` letters, and its completion; one in six names a random unknown command."""
    word = _letters(rng, length)
    if rng.random() < 1 / 6:
        command = _letters(rng, rng.randint(2, 4))
        if command not in SKILLS and command != COMMAND:
            return prompt(command, word), UNKNOWN
    command = rng.choice(list(SKILLS))
    return prompt(command, word), SKILLS[command](word)


def distinct_words(seed: int, count: int) -> list[str]:
    """`count` different words: a slice of them for training and the rest for the test can't overlap."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words[_letters(rng, rng.choice(WORD_LENGTHS))] = None
    return list(words)


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))
