"""What a worker is told to do: the job, its phases in order, and whom to tell on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from raybert.config import Recipe
from raybert.data import META, steps_per_epoch
from raybert.method import MethodConfig
from raybert.phase import Phase
from raybert.places import uri_of
from raybert.predictions import META as SEALED
from raybert.storage import arrived

Settled = dict[str, dict[str, Any]]
"""Methods settled against weights, by place in the chain; strings, as JSON wants its keys."""


class Hooks(Protocol):
    """What the loop tells the outside while it runs."""

    def report(self, metrics: dict[str, Any]) -> None:
        """New dev metrics; called on every worker."""
        ...

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is whole; called on every worker."""
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
        predictions: folder of the teacher's saved predictions; ``None``: it runs where it is asked.
        teacher_metrics: the teacher's dev metrics where they are known; ``None``: it is evaluated.
    """

    recipe: Recipe
    data: Path
    start: str
    teacher: str | None
    keep_head: bool
    predictions: Path | None = None
    teacher_metrics: dict[str, float] | None = None

    def on(self, root: Path) -> Job:
        """The job on this machine, which another has made: what it reads of object storage is
        brought here.

        Args:
            root: of that machine's mirrors.

        Raises:
            UserError: it cannot be brought.
        """
        out = uri_of(self.recipe.folder, root)
        return replace(
            self,
            recipe=self.recipe.model_copy(update={"out": out or self.recipe.out}),
            data=Path(arrived(str(self.data), root, META)),
            start=arrived(self.start, root),
            teacher=self.teacher and arrived(self.teacher, root),
            predictions=self.predictions and Path(arrived(str(self.predictions), root, SEALED)),
        )


@dataclass(frozen=True)
class PhaseOf:
    """A phase, the method it belongs to, that one's place in the chain, and whether it is that
    method's last."""

    phase: Phase
    method: MethodConfig | None = None
    place: int = 0
    last: bool = True


def phases_of(recipe: Recipe, model_config: Any, settled: Settled | None = None) -> list[PhaseOf]:
    """The recipe's phases in order; without methods, one plain phase.

    Args:
        recipe: the recipe.
        model_config: the Hugging Face config of the model to start from.
        settled: see `resolve_chain`.
    """
    if not recipe.method:
        return [PhaseOf(Phase())]
    chain, layer_map = [], None
    for place, method in enumerate(resolve_chain(recipe, model_config, settled)):
        phases = method.phases()
        for phase in phases:  # what layers stand for, they stand for in later phases too
            layer_map = phase.layer_map = phase.layer_map or layer_map
        chain += [PhaseOf(p, method, place, p is phases[-1]) for p in phases]
    return chain


def resolve_chain(
    recipe: Recipe, model_config: Any, settled: Settled | None = None
) -> list[MethodConfig]:
    """Every method resolved against the model that the one before it leaves.

    Args:
        recipe: the recipe.
        model_config: the Hugging Face config of the model to start from.
        settled: methods whose `settle` has been called, by place in the chain: they are as they
            were then.
    """
    resolved = []
    for place, method in enumerate(recipe.method):
        if settled and str(place) in settled:
            method = type(method).model_validate(settled[str(place)])
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
