"""Asking every adapter and the base the same questions at the same time, and scoring the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from hatrack_client import AsyncClient, Generation
from hatrack_trainer.demo.skills import COMMAND, SKILLS, WORD_LENGTHS, prompt

Answers = dict[str, list[str]]
"""By adapter name ("" is the base), one answer per word in the words' order."""
MAX_TOKENS = WORD_LENGTHS.stop + 1  # one more than the longest answer with its end
IN_FLIGHT = 512  # the server lets twice as many wait


@dataclass(frozen=True, slots=True)
class Score:
    """How often `adapter` answered exactly as `skill` does, from 0 to 1."""

    adapter: str
    skill: str
    exact: float


async def ask_all(address: str, adapters: Sequence[str], words: Sequence[str]) -> Answers:
    """What `generate_all` gives, as texts."""
    generations = await generate_all(address, adapters, words)
    return {adapter: [generation.text for generation in found] for adapter, found in generations.items()}


async def generate_all(address: str, adapters: Sequence[str], words: Sequence[str]) -> dict[str, list[Generation]]:
    """Greedy answers of each adapter to each word, many requests in flight at once.

    Raises HatrackClientError.
    """
    turns = asyncio.Semaphore(IN_FLIGHT)

    async def ask(adapter: str, word: str) -> Generation:
        async with turns:
            return await client.generate(adapter, prompt=prompt(COMMAND, word), max_tokens=MAX_TOKENS, temperature=0)

    async with AsyncClient(address, timeout=120) as client:
        # Word by word, so that neighbours in the queue want different adapters.
        flat = await asyncio.gather(*(ask(adapter, word) for word in words for adapter in adapters))
    return {adapter: list(flat[i :: len(adapters)]) for i, adapter in enumerate(adapters)}


def score(answers: Answers, words: Sequence[str], skill_of: dict[str, str]) -> list[Score]:
    """First the base, against whichever skill it comes closest to; then each adapter, against its own."""
    own = [Score(adapter, skill, exact(answers[adapter], words, skill)) for adapter, skill in skill_of.items()]
    base = [Score("", skill, exact(answers[""], words, skill)) for skill in skill_of.values()]
    return [max(base, key=lambda s: s.exact), *own]


def exact(answers: Sequence[str], words: Sequence[str], skill: str) -> float:
    """The share of words that were answered as the skill answers, from 0 to 1."""
    return sum(answer == SKILLS[skill](word) for answer, word in zip(answers, words, strict=True)) / len(words)
