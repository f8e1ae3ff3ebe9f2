"""What the packages below say to Python programmers, in the words of who types commands.

Their errors name arguments and classes (`model_framework`, `BentoMLConfig.port`). At the command
line these are options (`--framework`) and the settings of a file (`port`).
"""

from __future__ import annotations

import re

_SECTIONS = {
    "BentoMLConfig": "",
    "HTTPOptions": "http",
    "RayOptions": "ray",
    "AppleSiliconOptimization": "apple_silicon",
}
_OPTIONS = {
    "model_framework": "--framework",
    "model_name": "--name",
    "model_version": "--version",
    "service_name": "--service-name",
    "project_name": "--project",
    "base_model": "--base-model",
    "base_model=": "--base-model",
    "adapters=": "--adapter",
    "include_patterns": "--include",
    "exclude_patterns": "--exclude",
    "build_bento=False": "--no-bento",
    "max_tokens": "--max-tokens",
    "tracking_uri": "MLFLOW_TRACKING_URI",
}
_SECTION = re.compile(rf"\b({'|'.join(_SECTIONS)})(\.| has no field)")
# What stands in quotes or in a path is the user's own, and so is the name of a tensor
# (`base_model.model.lm_head.weight`).
_OPTION = re.compile(
    r"(?<![\w.'\"/-])(" + "|".join(sorted(_OPTIONS, reverse=True)) + r")(?![\w'\"/-]|\.\w)"
)


def at_the_command_line(sentence: str) -> str:
    """An error's sentence, with options and settings in place of Python's names."""
    if _SECTION.search(sentence):
        return _SECTION.sub(_setting, sentence)
    return _OPTION.sub(lambda found: _OPTIONS[found[1]], sentence)


def _setting(found: re.Match[str]) -> str:
    section = _SECTIONS[found[1]]
    if found[2] == ".":
        return f"{section}." if section else ""
    return f"{section} has no setting" if section else "there is no setting"
