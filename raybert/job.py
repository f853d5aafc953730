"""What a worker is told to do: the job, its phases in order, and whom to tell on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raybert.config import MethodConfig, Recipe
from raybert.data import steps_per_epoch
from raybert.phase import Phase


class Hooks(Protocol):
    """What the loop tells the outside while it runs."""

    def report(self, metrics: dict[str, Any]) -> None:
        """New dev metrics; called on every worker."""
        ...

    def progress(self, total: int, label: str) -> Any:
        """A progress bar with ``update(n)``, ``set_postfix_str(text)`` and ``close()``."""
        ...

    def note(self, text: str) -> None:
        """A warning for the user; called on the first worker."""
        ...


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    Attributes:
        recipe: the resolved recipe.
        data: folder of the prepared data.
        start: hub name or folder that the student starts from.
        teacher: folder of the fine-tuned teacher; ``None`` when a teacher is being fine-tuned.
        keep_head: whether a head that does not fit the task is an error.
    """

    recipe: Recipe
    data: Path
    start: str
    teacher: str | None
    keep_head: bool


@dataclass(frozen=True)
class PhaseOf:
    """A phase, the method it belongs to, and whether it is that method's last."""

    phase: Phase
    method: MethodConfig | None
    last: bool


def phases_of(recipe: Recipe, model_config: Any) -> list[PhaseOf]:
    """The recipe's phases in order; without methods, one plain phase."""
    if not recipe.method:
        return [PhaseOf(Phase(), None, True)]
    chain = []
    for method in resolve_chain(recipe, model_config):
        phases = method.phases()
        chain += [PhaseOf(p, method, p is phases[-1]) for p in phases]
    return chain


def resolve_chain(recipe: Recipe, model_config: Any) -> list[MethodConfig]:
    """Every method resolved against the model that the one before it leaves."""
    resolved = []
    for method in recipe.method:
        method = method.resolve(model_config)
        model_config = method.student_config(model_config)
        resolved.append(method)
    return resolved


def phase_steps(recipe: Recipe, phase: Phase, rows: int) -> int:
    """Optimiser steps of a phase over so many training rows."""
    train = recipe.train
    epochs = train.epochs if phase.epochs is None else phase.epochs
    each = steps_per_epoch(rows, train.batch_size, train.accumulation, recipe.workers)
    return min(round(each * epochs), train.max_steps or 10**12)
