from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hatrack_server.text.stops import StopStrings

# Two letters, so that stops overlap each other and themselves all the time.
TEXTS = st.text(st.sampled_from("ab"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=4)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The shortest prefix that ends with a stop, without the longest stop that it ends with."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def streamed(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    found, out = StopStrings(stops), ""
    for a, b in pairwise(edges):
        emitted, stopped = found.push(text[a:b])
        out += emitted
        if stopped:
            return out, True
    return out + found.flush(), False


@given(TEXTS, STOPS, st.lists(st.integers(0, 30)))
def test_equals_the_reference_however_the_text_is_split(text: str, stops: list[str], cuts: list[int]) -> None:
    assert streamed(text, stops, cuts) == reference(text, stops)


@given(TEXTS, STOPS)
def test_nothing_that_may_become_a_stop_is_emitted(text: str, stops: list[str]) -> None:
    found, out = StopStrings(stops), ""
    expected, _ = reference(text, stops)
    for character in text:
        emitted, stopped = found.push(character)
        out += emitted
        assert expected.startswith(out)
        if stopped:
            return


def test_holds_back_no_more_than_a_possible_start() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert stops.push("one\ntwo\n") == ("one\ntwo", False)
    assert stops.push("three\n\nUs") == ("\nthree", False)
    assert stops.push("er: x") == ("", True)


@pytest.mark.parametrize(("stops", "out"), [(["END"], "a"), (["ND", "END"], "a"), (["aEN", "END"], "")])
def test_the_one_that_is_complete_first_wins(stops: list[str], out: str) -> None:
    assert StopStrings(stops).push("aEND") == (out, True)


def test_without_stops_everything_passes() -> None:
    assert StopStrings([]).push("text") == ("text", False)
