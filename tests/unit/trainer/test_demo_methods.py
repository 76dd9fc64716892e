from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from hatrack_trainer.config import TrainSection
from hatrack_trainer.demo import methods_run
from hatrack_trainer.demo.base import Pretraining, make_base
from hatrack_trainer.demo.methods import FLOORS, KEYS, SKILL, section, write_rows
from hatrack_trainer.demo.methods_report import Result, methods_verdict, results_table
from hatrack_trainer.demo.quiz import exact
from hatrack_trainer.demo.server import Counts
from hatrack_trainer.demo.skills import COMMAND, SKILLS, pretraining_pair
from hatrack_trainer.demo.skills import test_words as held_out_words
from hatrack_trainer.errors import TrainerError
from hatrack_trainer.methods import methods

SMALL = Pretraining(hidden_size=64, intermediate_size=128, layers=4, heads=2, steps=2, batch_size=4)
COUNTS = Counts(steps=9, mixed_steps=4, completion_tokens=99)
BASE = Result("", 0, 0.0, 0.05, 100, 100)
GOOD = Result("lora", 1234567, 61.4, 0.85, 100, 100)
WEIGHTLESS = Result("ia3", 100, 9.6, 0.7, 100, 100)


def read(file: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["prompt"]: row["completion"] for row in rows}


class TestRows:
    def test_five_hundred_are_learned_and_none_of_them_is_held_out(self, tmp_path: Path) -> None:
        rows = write_rows(tmp_path)
        train, held_out = read(rows.train), read(rows.held_out)
        assert (len(train), len(held_out)) == (500, 100)
        assert not train.keys() & held_out.keys()

    def test_they_ask_for_a_skill_of_the_base_under_a_command_that_it_never_saw(self, tmp_path: Path) -> None:
        rows = write_rows(tmp_path)
        for question, answer in (read(rows.train) | read(rows.held_out)).items():
            command, word = question.removesuffix("=").split()
            assert (command, answer) == (COMMAND, SKILLS[SKILL](word))
        rng = random.Random(3)
        seen = {pretraining_pair(rng)[0].split()[0] for _ in range(20_000)}
        assert SKILL in seen
        assert COMMAND not in seen

    def test_they_are_the_same_each_time(self, tmp_path: Path) -> None:
        (tmp_path / "again").mkdir()
        first, second = write_rows(tmp_path), write_rows(tmp_path / "again")
        assert first.train.read_bytes() == second.train.read_bytes()
        assert first.held_out.read_bytes() == second.held_out.read_bytes()


def test_every_method_has_a_section_that_leaves_its_learning_rate_to_it() -> None:
    assert {name: section(name).method for name in methods()} == {name: name for name in methods()}
    assert KEYS.keys() | FLOORS.keys() <= methods().keys()


def test_exact_answers_are_counted() -> None:
    skill = SKILLS[SKILL]
    assert exact([skill("abc"), "abc", skill("a")], ["abc", "abc", "a"], SKILL) == pytest.approx(2 / 3)


class TestReport:
    def test_the_table_has_a_row_per_result(self) -> None:
        console = Console(file=io.StringIO(), width=120)
        console.print(results_table([BASE, GOOD, Result("ia3", 100, 9.6, 0.69, 100, 100)]))
        rows = [
            [cell.strip() for cell in line.strip("│").split("│")]
            for line in console.file.getvalue().splitlines()
            if line.startswith("│")
        ]
        assert rows == [
            ["the base alone", "", "", "0.05", "100/100", ""],
            ["lora", "1,234,567", "61", "0.85", "100/100", ""],
            ["ia3", "100", "10", "0.69", "100/100", "below 0.70"],
        ]

    def test_a_good_show(self) -> None:
        assert methods_verdict([BASE, GOOD, WEIGHTLESS], COUNTS) == (
            "2 methods, trained in 71 s; the server took 9 steps, 4 of them with two adapters or more in one batch"
        )

    @pytest.mark.parametrize(
        ("results", "counts", "sentence"),
        [
            ([Result("lora", 1, 1.0, 0.84, 100, 100)], COUNTS, r"^not as promised: lora \(below 0\.85\)$"),
            ([Result("lora", 1, 1.0, 0.9, 100, 99)], COUNTS, r"^not as promised: lora \(other tokens\)$"),
            ([Result("", 0, 0.0, 0.06, 100, 100), GOOD], COUNTS, r"the base alone \(above 0\.05\)$"),
            ([BASE, GOOD], Counts(9, 0, 99), "^none of 9 steps held two adapters: they were not served together$"),
        ],
    )
    def test_a_bad_one(self, results: list[Result], counts: Counts, sentence: str) -> None:
        with pytest.raises(TrainerError, match=sentence):
            methods_verdict(results, counts)


def test_two_methods_are_trained_served_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_run, "test_words", lambda: held_out_words()[:12])
    make_base(SMALL, tmp_path / "base", lambda *_: None)
    settings = TrainSection(max_steps=4, batch_size=4, threads=1)
    names = ["lora", "prefix_tuning"]
    results, counts = methods_run.compare(names, tmp_path / "base", tmp_path, settings, Console(file=io.StringIO()))
    assert [result.method for result in results] == ["", *names]
    assert [result.equal for result in results] == [12] * 3
    # A and B beside seven projections in four blocks; keys and values of 20 tokens in as many.
    widths = [(64, 64)] * 4 + [(64, 128)] * 3
    assert results[1].parameters == 4 * 16 * sum(a + b for a, b in widths)
    assert results[2].parameters == 4 * 20 * 2 * 64
    assert counts.mixed_steps > 0
