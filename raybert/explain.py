"""Sentences that tell what is wrong with a recipe, and which key was probably meant."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

from pydantic import BaseModel, ValidationError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxlevel = 3


def short(value: Any) -> str:
    """A value as an error shows it: a recipe may hold megabytes of one."""
    return _SHORT.repr(value)


def nearest(word: str, known: Any) -> str:
    """`` (did you mean 'x'?)`` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _fields(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that the section at ``path`` knows, as dotted names."""
    prefix = ""
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model, prefix = annotation, f"{prefix}{part}."
    return [prefix + key for key in model.model_fields]


def _all_keys(model: type[BaseModel]) -> list[str]:
    keys = _fields(model, ())
    sections = [k for k, f in model.model_fields.items() if isinstance(f.annotation, type)]
    return keys + [k for s in sections for k in _fields(model, (s,)) if "." in k]


def _elsewhere(word: str, model: type[BaseModel]) -> str:
    """A hint at a key of another section that ends like ``word``."""
    keys = {key.rpartition(".")[2]: key for key in _all_keys(model)}
    close = difflib.get_close_matches(word, keys, n=1, cutoff=0.6)
    return f" (did you mean {keys[close[0]]!r}?)" if close else ""


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Pydantic's error as sentences that name the key, the value found, and what would do."""
    sentences = []
    for item in error.errors(include_url=False):
        where = ".".join(
            str(p)
            for p in item["loc"]
            if not str(p).startswith(("constrained", "literal", "function"))
        )
        if item["type"] == "extra_forbidden":
            same_section = _fields(model, item["loc"][:-1])
            hint = nearest(where, same_section) or _elsewhere(str(item["loc"][-1]), model)
            sentences.append(f"unknown key `{where}`{hint}; known here: {', '.join(same_section)}")
        elif item["type"] == "value_error":
            message = str(item.get("ctx", {})["error"])
            sentences.append(message if not where or where == "method" else f"`{where}` {message}")
        else:
            sentences.append(f"`{where}`: {item['msg'].lower()}, found {short(item['input'])}")
    return prefix + "; ".join(dict.fromkeys(sentences)) + "."
