"""Tells whether a grammar can be compiled in time; runs as a process of its own.

    python -P grammar_trial.py      a grammar as a line of JSON -> an empty line, once compiled

llguidance limits what a compilation may do, and yet a schema of 2 KB with a few dozen patterns that
must hold together keeps it busy for ever. A thread cannot be stopped, and a process can. It imports
nothing of this package, so it starts in 0.1 s.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time

from llguidance import LLMatcher

CPU_S = 15


def main() -> None:
    """Try grammars until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with its input, after its server
        signal.signal(number, signal.SIG_IGN)
    _answer()  # it is ready
    for line in sys.stdin:
        _limit_time()
        LLMatcher.validate_grammar(json.loads(line))
        _answer()


def _limit_time() -> None:
    """However long it takes: who would end it may have been killed."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S, hard))


def _answer() -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
