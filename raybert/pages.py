"""HTML pages: self-contained files that load nothing and run no script."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from raybert import __version__, tables


def render(template: str, **values: Any) -> str:
    """A page as text.

    Args:
        template: its file in ``templates``.
        values: what the template shows; a page's head wants a ``title``.

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.
    """
    return _environment().get_template(template).render(version=__version__, **values)


@functools.cache
def _environment() -> Environment:
    """Templates that escape what they show, and write numbers as `raybert.tables` does."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        plain=tables.plain,
        shown=tables.shown,
        duration=tables.duration,
        count=tables.count,
        score=tables.score,
        megabytes=tables.megabytes,
    )
    return environment
