"""Stop texts, matched on the text and not on token ids: a tokenizer may split them in many ways."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Collects a generation's text and finds the first stop text in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.text = ""
        """The text so far, without the stop text and what follows it."""
        self.has_stopped = False
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)

    def add(self, segment: str) -> bool:
        """Append the next piece of text; True when a stop text is complete."""
        # A stop text that ends in this segment begins at most so far before it.
        start = max(0, len(self.text) - self._longest + 1)
        self.text += segment
        found = [at for stop in self._stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.has_stopped = True
        return self.has_stopped
