"""Model and Bento tags: what a name or version must look like, and how one is made from another.

BentoML's rule: `[a-z0-9]([-._a-z0-9]*[a-z0-9])?`, at most 63 characters; `latest` is reserved.
"""

from __future__ import annotations

import re

from packaging.version import InvalidVersion, Version

from mlops.errors import PackagingError

MAX_LENGTH = 63

_TAG_PART = re.compile(r"[a-z0-9]([-._a-z0-9]*[a-z0-9])?")
_NAME_CHARACTERS = re.compile(r"[A-Za-z0-9 ._/+\-]+")
# semver.org's rule, with or without a leading "v"
_SEMANTIC_VERSION = re.compile(
    r"v?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?"
)


def valid_name(name: str, field: str = "model_name") -> str:
    """The name as a tag allows it: lower case, other characters as `-`.

    Raises:
        PackagingError: it is empty, too long, or has characters that no name should have, such as
            a line break or a quote.
    """
    details = {"field": field, "value": name}
    if not isinstance(name, str) or not _NAME_CHARACTERS.fullmatch(name):
        raise PackagingError(
            f"{field} {name!r} is not a name: use letters, digits, '-', '_' and '.'",
            "validate_name",
            details,
        )
    tag_name = re.sub(r"[ /+]+", "-", name.lower()).strip("-._")
    if not tag_name or len(tag_name) > MAX_LENGTH:
        raise PackagingError(
            f"{field} {name!r} must have 1 to {MAX_LENGTH} characters and begin with one of a-z0-9",
            "validate_name",
            details,
        )
    return tag_name


def valid_version(version: str) -> str:
    """The version that a user gives, as a tag allows it: `1.2.3+Build.5` becomes `1.2.3-build.5`.

    It is `major.minor.patch`, with what may follow that. Versions that are made from the content
    are tags' too, but nobody gives them.

    Raises:
        PackagingError: it is not a version.
    """
    if not isinstance(version, str) or not _is_version(version):
        raise PackagingError(
            f"model_version {version!r} is not a version: use major.minor.patch, such as '1.2.3'",
            "validate_version",
            {"field": "model_version", "value": version},
        )
    return version.lower().replace("+", "-")


def _is_version(version: str) -> bool:
    if len(version) > MAX_LENGTH or not version.isascii():
        return False
    if not _TAG_PART.fullmatch(version.lower().replace("+", "-")):
        return False
    if _SEMANTIC_VERSION.fullmatch(version):
        return True
    try:
        return len(Version(version).release) == 3  # 1.2.3rc1, as Python's packages are numbered
    except InvalidVersion:
        return False


def is_tag(text: str) -> bool:
    """True for `name` and `name:version` as BentoML allows them."""
    name, colon, version = text.partition(":")
    parts = [name, version] if colon else [name]
    return all(len(part) <= MAX_LENGTH and _TAG_PART.fullmatch(part) for part in parts)
