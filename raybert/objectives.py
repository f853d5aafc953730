"""What a search is for: numbers of a run's report, and whether each is to be large or small."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from raybert.errors import UserError
from raybert.explain import nearest
from raybert.results import RunReport, latency_ms

KNOWN = {
    "score": "max:student.score",
    "retained": "max:retained",
    "bytes": "min:student.bytes.weights",
    "parameters": "min:student.parameters.total",
    "flops": "min:student.flops",
    "latency": "min:latency",
    "seconds": "min:training.seconds",
}
"""Objectives by their short names, as direction and place in ``report.json``; ``latency`` is the
median in milliseconds of the smallest batch that was timed, in the fastest backend."""

LATENCY = "latency"

RUNNING = {
    *(("student", key) for key in ("score", "metrics", "parameters", "flops")),
    *(("training", key) for key in ("seconds", "steps", "tokens")),
    *(("student", "bytes", "weights"), ("retained",), ("ratio",)),
}
"""Places in a report, or the beginnings of places, that running trials fill; see
`raybert.trial.so_far`."""

STAND_IN = "flops"
"""What trials are judged by where latency is asked for: it cannot be timed while others run."""


@dataclass(frozen=True)
class Objective:
    """One number of a report, and the direction in which it is better."""

    name: str
    path: tuple[str, ...]
    mode: str

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.mode == "max" else -1

    def of(self, report: RunReport) -> float | None:
        """The number in a report; None where it was not measured."""
        if self.path == (LATENCY,):
            return latency_ms(report)
        return self.at(report.model_dump())

    def at(self, report: Mapping[str, Any]) -> float | None:
        """The number in as much of a report as there is; None where it is not there."""
        value: Any = report
        for part in self.path:
            value = None if value is None else value.get(part)
        return None if value is None else float(value)

    @property
    def while_running(self) -> bool:
        """Whether a trial knows it before its end: the size that its model will have, what it has
        scored and what it has spent so far."""
        return self.path in RUNNING or self.path[:2] in RUNNING


def parse_objectives(words: str | Sequence[str], metrics: Sequence[str]) -> tuple[Objective, ...]:
    """Objectives from their names, or from ``max:`` or ``min:`` and a place in ``report.json``.

    Args:
        words: such as ``score,bytes`` or ``["score", "max:student.metrics.accuracy"]``.
        metrics: those that the task has.

    Raises:
        UserError: no report has such a number, a name twice, or none.
    """
    parts = words.split(",") if isinstance(words, str) else list(words)
    names = [part.strip() for part in parts if part.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"objectives {words!r} name none, or one twice; write score,bytes.")
    return tuple(_parse(name, metrics) for name in names)


def _parse(name: str, metrics: Sequence[str]) -> Objective:
    mode, found, place = KNOWN.get(name, name).partition(":")
    if not found:
        raise UserError(
            f"no report has an objective {name!r}{nearest(name, KNOWN)}; known: "
            f"{', '.join(KNOWN)}, or max: or min: and a place in report.json, such as "
            f"max:student.metrics.{metrics[0]}."
        )
    if mode not in ("max", "min"):
        raise UserError(f"objective {name!r} says neither max: nor min:, but {mode}:.")
    path = tuple(place.split("."))
    if path != (LATENCY,):
        _check_place(name, path, metrics)
    return Objective(name, path, mode)


def _check_place(name: str, path: tuple[str, ...], metrics: Sequence[str]) -> None:
    """Refuse a place where no report has a number."""
    kind: Any = RunReport
    for depth, part in enumerate(path):
        known: Sequence[str] = ()
        if kind == dict[str, float]:  # other dictionaries have names that runs settle
            known, kind = metrics, float
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            known = list(kind.model_fields)
            kind = _plain(kind.model_fields[part].annotation) if part in known else None
        if part not in known:
            where = ".".join(path[:depth]) or "report.json"
            raise UserError(
                f"objective {name!r}: {where} has no {part!r}{nearest(part, known)}; it has "
                f"{', '.join(known) or 'nothing to go by'}."
            )
    if kind not in (int, float):
        raise UserError(f"objective {name!r} is no number, but {'.'.join(path)} as a whole.")


def _plain(annotation: Any) -> Any:
    """A type without its ``| None``."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    optional = type(None) in typing.get_args(annotation)
    return kinds[0] if optional and len(kinds) == 1 else annotation


def in_trials(objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """What trials are judged by while others run: FLOPs stand in for latency."""
    found = [_parse(STAND_IN, ("",)) if entry.path == (LATENCY,) else entry for entry in objectives]
    return tuple({entry.path: entry for entry in found}.values())


def front(rows: Sequence[Mapping[str, Any]], objectives: Sequence[Objective]) -> list[bool]:
    """Which rows no other beats: at least as good in every objective and better in one.

    Args:
        rows: each maps an objective's name to its number; one that lacks a number is on no front.
        objectives: what counts.
    """
    points = [tuple(_worth(row.get(o.name), o) for o in objectives) for row in rows]
    return [
        all(math.isfinite(x) for x in own)
        and not any(q != own and all(a >= b for a, b in zip(q, own, strict=True)) for q in points)
        for own in points
    ]


def _worth(value: Any, objective: Objective) -> float:
    """A number of which more is better; minus infinity for one that is not there."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return objective.sign * float(value) if known else -math.inf
