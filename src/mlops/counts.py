"""Numbers of things in sentences: `1 request`, `2 requests`."""

from __future__ import annotations


def count(number: int, one: str, several: str | None = None) -> str:
    """A number and its noun, or as much of the sentence as differs.

    Args:
        one: after 1, such as `request` or `request is`.
        several: after any other number; by default `one` and an s.
    """
    return f"{number} {one if number == 1 else several or f'{one}s'}"
