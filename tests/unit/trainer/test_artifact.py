from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hatrack_trainer.artifact import all_or_nothing
from hatrack_trainer.errors import TrainerError


def fill(folder: Path, name: str, then: Callable[[], None] = lambda: None) -> None:
    with all_or_nothing(folder, "output.dir") as partial:
        (partial / name).touch()
        then()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_there_after_any_error(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(error):
        fill(tmp_path / "deep" / "out", "half", fail)
    assert not any(tmp_path.iterdir())


def test_of_two_at_once_the_first_is_kept_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TrainerError, match=r"^output\.dir: .* not empty"):
        fill(out, "late", lambda: fill(out, "whole"))
    assert [file.relative_to(tmp_path) for file in tmp_path.rglob("*")] == [Path("out"), Path("out/whole")]


def test_what_a_kill_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    others = [tmp_path / ".out.settings", tmp_path / ".out2.hatrack-partial-x"]
    for left in [*others, tmp_path / ".out.hatrack-partial-x"]:
        left.mkdir()
    fill(tmp_path / "out", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", *others])
