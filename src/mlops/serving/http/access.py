"""Who may ask, and how much: API keys, and limits for each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mlops.errors import ConfigError

KEYS_VARIABLE = "MLOPS_API_KEYS"


def read_api_keys(path: str | None, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The keys in the file (one on each line) and in `MLOPS_API_KEYS` (between commas).

    Raises:
        ConfigError: the file cannot be read.
    """
    variables = os.environ if environ is None else environ
    keys = [key.strip() for key in variables.get(KEYS_VARIABLE, "").split(",")]
    if path is not None:
        try:
            keys += [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
        except (OSError, UnicodeError) as exc:
            raise ConfigError(f"the API keys in {path} cannot be read: {exc}") from exc
    return tuple(dict.fromkeys(key for key in keys if key))
