from __future__ import annotations

import random
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from hatrack_server.metrics import Metrics
from hatrack_server.types import EngineStats
from hatrack_trainer.demo.cache import Cache
from hatrack_trainer.demo.quiz import Score, score
from hatrack_trainer.demo.report import verdict
from hatrack_trainer.demo.server import Counts, parse_counts
from hatrack_trainer.demo.skills import COMMAND, SKILLS, pretraining_pair, training_words
from hatrack_trainer.demo.skills import test_words as held_out_words
from hatrack_trainer.errors import TrainerError

GOOD = [Score("", "up", 0.0), Score("a", "up", 1.0)]
COUNTS = Counts(steps=9, mixed_steps=4, completion_tokens=99)


class TestSkills:
    def test_what_they_do(self) -> None:
        assert {name: skill("abz") for name, skill in SKILLS.items()} == {
            "copy": "abz",
            "up": "ABZ",
            "next": "bca",
            "rev": "zba",
        }

    def test_held_out_words_are_never_seen(self) -> None:
        held_out = set(held_out_words())
        assert len(held_out) == 100
        assert not held_out & set(training_words())
        rng = random.Random(1)
        seen = {pretraining_pair(rng)[0].partition("=")[0].split()[1] for _ in range(30_000)}
        assert not held_out & seen

    def test_the_base_never_sees_the_adapters_command(self) -> None:
        rng = random.Random(2)
        assert not any(pretraining_pair(rng)[0].startswith(f"{COMMAND} ") for _ in range(30_000))


class TestCache:
    def test_what_it_is_made_from_is_its_name(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        assert cache.path("base", {"a": 1, "b": 2}) == cache.path("base", {"b": 2, "a": 1})
        assert cache.path("base", {"a": 1}) != cache.path("base", {"a": 2})

    def test_a_failed_build_leaves_nothing(self, tmp_path: Path) -> None:
        def build(folder: Path) -> None:
            folder.mkdir()
            (folder / "half").touch()
            raise OSError("disk full")

        cache = Cache(tmp_path / "new")
        path = cache.path("base", {})
        with pytest.raises(OSError, match="disk full"):
            cache.make(path, build)
        assert list((tmp_path / "new").iterdir()) == []

    def test_the_first_of_two_builds_stays(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        path = cache.path("base", {})

        def build(folder: Path) -> None:
            folder.mkdir()
            (folder / "mine").touch()
            path.mkdir()
            (path / "other").touch()

        cache.make(path, build)
        assert [file.name for file in path.iterdir()] == ["other"]


class TestCounts:
    def test_reads_what_the_server_exposes(self) -> None:
        metrics = Metrics()
        metrics.observe(EngineStats(steps=5, completion_tokens=12, adapters_per_step=(0, 1, 2, 3, 40)))
        assert parse_counts(generate_latest(metrics.registry).decode()) == Counts(5, 3, 12)


class TestVerdict:
    def test_scores_adapters_on_their_own_skill_and_the_base_on_its_best(self) -> None:
        answers = {"": ["AB", "?"], "a": ["AB", "CD"], "b": ["ba", "cd"]}
        assert score(answers, ["ab", "cd"], {"a": "up", "b": "rev"}) == [
            Score("", "up", 0.5),
            Score("a", "up", 1.0),
            Score("b", "rev", 0.5),
        ]

    def test_a_good_show(self) -> None:
        assert verdict(GOOD, COUNTS).startswith("the server took 9 steps, 4 of them with two adapters")

    @pytest.mark.parametrize(
        ("scores", "counts", "sentence"),
        [
            ([GOOD[0], Score("a", "up", 0.89)], COUNTS, "a got 89%, less than 90%"),
            ([Score("", "up", 0.21), GOOD[1]], COUNTS, "the base alone got 21%"),
            (GOOD, Counts(9, 0, 99), "none of 9 steps held two adapters"),
        ],
    )
    def test_a_bad_one(self, scores: list[Score], counts: Counts, sentence: str) -> None:
        with pytest.raises(TrainerError, match=sentence):
            verdict(scores, counts)
