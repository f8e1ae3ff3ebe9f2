"""Renders chat templates; runs as a process of its own (`helper_process`).

    python -P template_process.py       a line of JSON with template and variables -> text, or error

A template is a program of the checkpoint's: it may loop for ever, or make a text of any size in one
step that nothing can interrupt. Both end here, with the process at worst.

What templates may use is what transformers gives them, whose `apply_chat_template` renders the same
text. Its own code is not used: to import it takes a second and 75 MB, jinja2 alone 0.1 s and 20.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_GROWTH = 8
"""A text may be so many times as long as what it is made of, and `MIN_CHARACTERS` in any case."""

MIN_CHARACTERS = 1024 * 1024
MEMORY_BYTES = 512 * 1024 * 1024
"""Besides what the process has and `MEMORY_GROWTH` times what it is asked with."""

MEMORY_GROWTH = 32
MAX_REASON_CHARACTERS = 200
CPU_S = 15


def main() -> None:
    """Render until the input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with its input, after its server
        signal.signal(number, signal.SIG_IGN)
    _answer("")  # it is ready
    for line in sys.stdin.buffer:
        _limit_time()
        _limit_memory(len(line))
        _answer(json.dumps(_render(line)))


def _render(line: bytes) -> dict[str, str]:
    variables = json.loads(line)
    try:
        text = _compile(variables.pop("chat_template")).render(variables)
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as exc:  # whatever a template does
        reason = " ".join(str(exc).split()) or type(exc).__name__
        return {"error": reason[:MAX_REASON_CHARACTERS]}
    if len(text) > max(MIN_CHARACTERS, MAX_GROWTH * len(line)):
        return {"error": f"it makes {len(text)} characters of {len(line)}"}
    return {"text": text}


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _PublicNamespace,
    }
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}`: around what a model is trained to say. It changes no text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PublicNamespace(Namespace):
    """Without a way to Python's inside."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        namespace, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(namespace, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own writes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _limit_time() -> None:
    """However long it takes: who would end it may have been killed."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S, hard))


def _limit_memory(num_bytes: int) -> None:
    """Linux alone keeps such a limit; elsewhere only time and the size of the text are bounded."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        used = int(statistics.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = used + MEMORY_BYTES + MEMORY_GROWTH * num_bytes
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _answer(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
