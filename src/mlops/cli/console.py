"""Where commands print: results on stdout, all else on stderr.

In a terminal, text wraps at its width. In a pipe or a file nothing wraps, so that a line stays a
line for whatever reads it.
"""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

UNWRAPPED = 100_000
"""Columns of what is no terminal."""


def width(stream: TextIO | None = None) -> int:
    """Columns to write in; of stdout when no stream is given."""
    if not (stream or sys.stdout).isatty():
        return UNWRAPPED
    return shutil.get_terminal_size().columns


def output() -> Console:
    """The console for a command's result."""
    return _console(sys.stdout)


def errors() -> Console:
    """The console for progress and for what went wrong."""
    return _console(sys.stderr)


def print_json(result: Any, **options: Any) -> None:
    """Print a result for a program to read."""
    import json

    typer.echo(json.dumps(result, ensure_ascii=False, indent=1, **options))


def print_note(sentence: str) -> None:
    """Tell something that is not the command's result."""
    errors().print(sentence, style="yellow")


def print_error(sentence: str) -> None:
    """Tell what went wrong."""
    errors().print(sentence, style="red")


def print_text(text: str) -> None:
    """Print what a model has written."""
    written = StreamedText()
    written.write(text)
    written.close()


def printable(text: str) -> str:
    """Text of a service or a model without what a terminal would obey."""
    return "".join(
        one if one.isprintable() or one in "\n\t" else " " if one.isspace() and one > "\x7f" else ""
        for one in text
    )


class StreamedText:
    """Writes text to stdout as it comes; in a terminal it wraps between words.

    So a word is shown there once it is complete; `close` shows the last one and ends the line.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._has_begun = False
        self._word = ""
        self._blanks = ""
        self._column = 0

    def write(self, piece: str) -> None:
        self._has_begun = True
        if not self._is_terminal:
            typer.echo(piece, nl=False, color=True)  # as it is, escapes and all
            return
        *complete, self._word = re.split(r"(?<=\s)", self._word + printable(piece))
        for word in complete:
            self._show(word[:-1], word[-1])

    def close(self) -> None:
        """End the line, if there is one."""
        self._show(self._word, "")
        if self._has_begun:
            typer.echo()
        self._word, self._blanks, self._column, self._has_begun = "", "", 0, False

    def _show(self, word: str, blank: str) -> None:
        """Show a word, and keep what is after it until it is clear whether the line ends there."""
        from rich.cells import cell_len

        if word:
            length = cell_len(word)
            if self._column and self._column + len(self._blanks) + length > width():
                typer.echo()
                self._column, self._blanks = 0, ""
            typer.echo(self._blanks + word, nl=False)
            self._column += len(self._blanks) + length
            self._blanks = ""
        if blank == "\n":
            typer.echo()
            self._column, self._blanks = 0, ""
        else:
            self._blanks += blank


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    is_terminal = stream.isatty()
    return Console(
        file=stream,
        width=None if is_terminal else UNWRAPPED,
        force_terminal=is_terminal,
        highlight=False,
        markup=False,
        emoji=False,
    )
