"""The demo's text skills: one command and one word in, the word changed out. Everything is drawn from fixed seeds."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from functools import cache

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
ALPHABET = string.ascii_letters + " =" + UNKNOWN
WORD_LENGTHS = range(3, 8)
TRAINING_WORDS, TEST_WORDS = 500, 100


def prompt(command: str, word: str) -> str:
    """The text that a completion follows."""
    return f"{command} {word}="


def training_words() -> list[str]:
    """The words that adapters learn from."""
    return list(_words()[:TRAINING_WORDS])


def test_words() -> list[str]:
    """Words that neither the base nor any adapter has seen."""
    return list(_words()[TRAINING_WORDS:])


def pretraining_pair(rng: random.Random) -> tuple[str, str]:
    """A prompt and its completion; one in six names a random command, which is unknown. Never a test word."""
    word = _letters(rng, rng.choice(WORD_LENGTHS))
    while word in _held_out():
        word = _letters(rng, len(word))
    if rng.random() < 1 / 6:
        command = _letters(rng, rng.randint(2, 4))
        if command not in SKILLS and command != COMMAND:
            return prompt(command, word), UNKNOWN
    command = rng.choice(list(SKILLS))
    return prompt(command, word), SKILLS[command](word)


@cache
def _words() -> tuple[str, ...]:
    """Different words, so that no slice of them overlaps another."""
    rng = random.Random(7)  # noqa: S311 -- data to learn from, not a secret
    words: dict[str, None] = {}
    while len(words) < TRAINING_WORDS + TEST_WORDS:
        words[_letters(rng, rng.choice(WORD_LENGTHS))] = None
    return tuple(words)


@cache
def _held_out() -> frozenset[str]:
    return frozenset(test_words())


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))
