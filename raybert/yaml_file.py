"""YAML that somebody else wrote: read without building objects, and refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raybert.errors import UserError

NOT_YAML = (yaml.YAMLError, ValueError, AttributeError, RecursionError)
"""What PyYAML raises: a date of month 13 is a ValueError, a wrong `!!timestamp` an AttributeError,
brackets by the thousand a RecursionError."""

MOST_VALUES = 100_000
"""Values that a text may stand for, its anchors followed."""


def parse_yaml(text: str) -> Any:
    """The data that a YAML text stands for.

    Raises:
        NOT_YAML: it is none, or its anchors make a few lines stand for more than memory holds.
    """
    data = yaml.safe_load(text)
    waiting, seen = [data], 0
    while waiting:
        part = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ValueError(f"its anchors make it stand for more than {MOST_VALUES} values")
        if isinstance(part, (dict, list, tuple, set)):
            waiting += [*part, *(part.values() if isinstance(part, dict) else ())]
    return data


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """A YAML file's mapping, empty where the file is.

    Args:
        path: the file.
        what: it should be, for the error.

    Raises:
        UserError: it is no YAML, or no mapping.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except NOT_YAML as error:
        raise UserError(f"{path} is not readable as YAML: {_where(error)}.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(
            f"{path} is no {what}: it holds a {type(data).__name__}, and a {what} is a mapping of "
            "keys to values."
        )
    return data


def _where(error: Exception) -> str:
    """What PyYAML found, and in which line, without the excerpt that it draws over several."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split()).rstrip(".")
