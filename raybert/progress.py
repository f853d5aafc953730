"""How far the work is: a bar on a terminal; elsewhere, as in a job's log, a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY = 20.0
"""Seconds between two lines."""


def on_terminal() -> bool:
    """Whether somebody looks at a bar that is drawn over and over."""
    return sys.stderr.isatty()


def bar(total: int, label: str, unit: str = "step") -> Any:
    """A progress bar with ``update(n)``, ``set_postfix_str(text)`` and ``close()``; a context
    manager.

    Args:
        total: how much there is to do.
        label: what is done.
        unit: what is counted.
    """
    if not on_terminal():
        return Lines(total, label, unit)
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, mininterval=0.5)


class NoBar:
    """A bar where nobody looks."""

    def update(self, n: int) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """A bar as whole lines on stderr: the first at once, the last when it is closed."""

    def __init__(self, total: int, label: str, unit: str = "step") -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.text = 0, ""
        self._told_at = 0.0
        self._before = (time.monotonic(), 0)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int) -> None:
        """So many more are done."""
        self.done += n
        now = time.monotonic()
        if now - self._told_at >= EVERY or not self._told_at:
            self._tell(now)

    def set_postfix_str(self, text: str) -> None:
        """What the next line says at its end."""
        self.text = text

    def close(self) -> None:
        """Tell how far it came."""
        self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        parts = [f"{self.label}: {self.unit} {self.done} of {self.total}"]
        began, had = self._before
        if had < self.done < self.total and self._told_at:
            left = (now - began) / (self.done - had) * (self.total - self.done)
            parts.append(f"about {left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        print(", ".join([*parts, *([self.text] if self.text else [])]), file=sys.stderr, flush=True)
        self._told_at, self._before = now, (now, self.done)
