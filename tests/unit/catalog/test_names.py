"""References to adapters."""

from __future__ import annotations

import pytest

from hatrack_server.catalog.names import Reference, parse_reference
from hatrack_server.errors import NotFound


@pytest.mark.parametrize(
    ("text", "reference"),
    [("tone", Reference("tone", 0)), ("tone@2", Reference("tone", 2)), ("0.a_b-c@10", Reference("0.a_b-c", 10))],
)
def test_references(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@1",
        "tone@",
        "tone@0",
        "tone@01",
        "tone@-1",
        "tone@1@2",
        "tone@²",
        "Tone",
        "t" * 65,
        "../t",
        "tone@9999999999",
    ],
)
def test_what_names_nothing(text: str) -> None:
    with pytest.raises(NotFound):
        parse_reference(text)
