"""Stop texts, whatever pieces the text comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.engine.stops import StopMatcher


def run(stops: list[str], pieces: list[str]) -> StopMatcher:
    matcher = StopMatcher(stops)
    for piece in pieces:
        if matcher.add(piece):
            break
    return matcher


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "has_stopped"),
    [
        ([], ["a", "b"], "ab", False),
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one EN"], "one EN", False),
        (["b", "ab"], ["xab"], "x", True),
        (["\n\n"], ["a\n", "\nb"], "a", True),
        (["é"], ["café au lait"], "caf", True),
        (["aab"], ["aaa", "b"], "a", True),
    ],
)
def test_text_ends_before_the_first_stop_text(
    stops: list[str], pieces: list[str], text: str, has_stopped: bool
) -> None:
    matcher = run(stops, pieces)
    assert (matcher.text, matcher.has_stopped) == (text, has_stopped)


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_found_as_soon_as_complete_and_never_left_in_the_text(
    stops: list[str], pieces: list[str]
) -> None:
    matcher = run(stops, pieces)
    assert not any(stop in matcher.text for stop in stops)
    assert matcher.has_stopped == any(stop in "".join(pieces) for stop in stops)
    assert "".join(pieces).startswith(matcher.text)
