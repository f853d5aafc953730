"""Numbers as people read them, and tables of them as Markdown."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from raybert.groups import Spread

MISSING = "n/a"
"""What stands where there is no number."""


def score(value: Spread | float | None) -> str:
    """A metric to three decimals, with its deviation: ``0.824 ± 0.006``."""
    if isinstance(value, Spread):
        return f"{value.mean:.3f}" + (f" ± {value.sd:.3f}" if value.sd is not None else "")
    return MISSING if value is None else f"{value:.3f}"


def percent(value: Spread | float | None) -> str:
    """A share in percent: ``54 %``, or ``54 ± 3 %``."""
    if isinstance(value, Spread):
        spread = f" ± {value.sd * 100:.0f}" if value.sd is not None else ""
        return f"{value.mean * 100:.0f}{spread} %"
    return MISSING if value is None else f"{value * 100:.0f} %"


def times(value: Spread | float | None) -> str:
    """A factor: ``2.01×``, or ``2.01 ± 0.03×``."""
    if isinstance(value, Spread):
        return f"{value.mean:.2f}" + (f" ± {value.sd:.2f}" if value.sd is not None else "") + "×"
    return MISSING if value is None else f"{value:.2f}×"


def count(value: Spread | float) -> str:
    """A large number with a decimal prefix and three figures: ``22.7 M``, or ``1.64 ± 0.09 G``."""
    mean = value.mean if isinstance(value, Spread) else value
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(mean) >= size:
            return f"{_three(value, size)}{unit}"
    return f"{mean:.0f}"


def megabytes(value: Spread | float) -> str:
    """Bytes in MB of 10^6: ``90.9 MB``."""
    return f"{_three(value, 1e6)} MB"


def duration(seconds: float) -> str:
    """``41 s``, ``12 min 5 s`` or ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plain(value: Any) -> str:
    """A parameter's or machine's value in words."""
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value) or "none"
    return "none" if value is None else str(value)


def shown(value: Any) -> str:
    """A recipe's value as it is written there, numbers to four figures."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _three(value: Spread | float, unit: float) -> str:
    """Three figures, and never an exponent; the deviation to as many decimals, where it shows."""
    mean, sd = (value.mean, value.sd) if isinstance(value, Spread) else (value, None)
    mean, sd = mean / unit, (sd or 0.0) / unit
    decimals = 2 - math.floor(math.log10(abs(mean))) if mean else 0
    decimals = min(max(decimals, 0), 3)
    spread = f"{sd:.{decimals}f}"
    return f"{mean:.{decimals}f}" + (f" ± {spread}" if float(spread) else "")


def escape_markdown(text: str) -> str:
    """Text that neither ends a table's cell nor starts HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also lines up as plain text: first column left, the others right."""
    widths = [max(3, *(len(row[i]) for row in (head, *rows))) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])
