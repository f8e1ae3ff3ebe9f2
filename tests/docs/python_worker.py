"""Runs the Python blocks of one document, one after the other, in one namespace.

Reads a JSON object a line from standard input (`path`, `line`, `code`) and writes one a line
(`output`, `error`) to the file descriptor named as its argument.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as answers:
        for command in sys.stdin:
            block = json.loads(command)
            answers.write(json.dumps(run(namespace, **block)) + "\n")


def run(namespace: dict[str, Any], path: str, line: int, code: str) -> dict[str, str]:
    output = io.StringIO()
    error = ""
    try:
        # Line numbers of a traceback are the document's.
        compiled = compile("\n" * line + code, path, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(output):
            exec(compiled, namespace)  # noqa: S102
    except BaseException:
        error = traceback.format_exc()
    return {"output": output.getvalue(), "error": error}


if __name__ == "__main__":
    main()
