"""The end of a search: which trials are run again with other seeds, and which of them wins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raybert.config import UserError
from raybert.groups import Spread
from raybert.ledger import Ledger, Trial
from raybert.objectives import LATENCY, Objective, front, in_trials
from raybert.results import RunReport, read_run

RULE = (
    "Of the finalists, {seeds}, the one with the least {cost} wins "
    "whose mean score over its seeds is at least {least:.4f}: the teacher's {teacher:.4f} less "
    "{loss}. Finalists are the trials with the least {cost} among those that reached that score "
    "once, and the one with the best score."
)
"""How the winner is found; the report says so."""


@dataclass(frozen=True)
class Loss:
    """The accuracy that one can afford to lose: points of the metric, or a share of what the
    teacher has learned above the floor."""

    amount: float
    relative: bool

    @property
    def text(self) -> str:
        """In words."""
        if self.relative:
            return f"{self.amount:.0%} of what it has learned above the floor"
        return f"{self.amount:g}"

    def least(self, teacher: float, floor: float) -> float:
        """The score that a student must reach."""
        lost = self.amount * max(0.0, teacher - floor) if self.relative else self.amount
        return teacher - lost


def parse_loss(text: str) -> Loss:
    """``0.01`` (of the metric) or ``5%`` (of what the teacher has learned).

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *(%?)", text.strip())
    if match is None:
        raise UserError(
            f"loss {text!r} is neither a number of the metric's points, such as 0.01, nor a share "
            "of what the teacher has learned, such as 5%."
        )
    amount, relative = float(match[1]), bool(match[2])
    amount = amount / 100 if relative else amount
    if amount > 1:
        raise UserError(f"loss {text!r} is more than there is; metrics go from 0 to 1: try 0.01.")
    return Loss(amount, relative)


@dataclass(frozen=True)
class Finished:
    """A finished trial, with the reports of its runs."""

    trial: Trial
    reports: tuple[RunReport, ...]

    @property
    def score(self) -> Spread:
        """Over its seeds."""
        found = Spread.of([report.student.score for report in self.reports])
        assert found is not None
        return found

    def number(self, objective: Objective) -> float | None:
        """An objective of its first run, which is the one that was measured."""
        return objective.of(self.reports[0])


def read_finished(ledger: Ledger, folder: Path) -> list[Finished]:
    """Every trial of a search that has a finished model."""
    found = []
    for trial in ledger.trials:
        if trial.state != "finished":
            continue
        runs = [folder / "trials" / trial.name]
        again = [t for t in ledger.seeds_of(trial.number) if t.state == "finished"]
        runs += [folder / "finalists" / t.name for t in again]
        found.append(Finished(trial, tuple(read_run(run).report for run in runs)))
    return found


def cost_of(objectives: Sequence[Objective]) -> Objective | None:
    """What is to be small: the first objective that is; None where only scores count."""
    return next((o for o in objectives if o.mode == "min"), None)


def judged_by(
    finished: Sequence[Finished], objectives: Sequence[Objective]
) -> tuple[Objective, ...]:
    """What can be judged by: where latency is asked for and none could be timed, FLOPs."""
    timed = [f.number(o) for f in finished for o in objectives if o.path == (LATENCY,)]
    lacking = bool(timed) and not any(value is not None for value in timed)
    return in_trials(objectives) if lacking else tuple(objectives)


def least_score(finished: Sequence[Finished], loss: Loss) -> float:
    """The score that a student must reach; the teacher is the same for all."""
    report = finished[0].reports[0]
    teacher = report.teacher.score if report.teacher else report.student.score
    return loss.least(teacher, report.floor)


def finalists_of(
    finished: Sequence[Finished], objectives: Sequence[Objective], loss: Loss, count: int
) -> list[Finished]:
    """The trials to be run again: the cheapest that reached the least score, and the best.

    Args:
        finished: what there is to choose from.
        objectives: the first that is to be small is the cost; without one, the best scores count.
        loss: what one can afford.
        count: how many.
    """
    if not count or not finished:
        return []
    by_score = sorted(finished, key=lambda f: -f.reports[0].student.score)
    cost = cost_of(objectives)
    if cost is None:
        return by_score[:count]
    least = least_score(finished, loss)
    within = [f for f in by_score if f.reports[0].student.score >= least]
    within = [f for f in within if f.number(cost) is not None]
    cheapest = sorted(within, key=lambda f: f.number(cost) or 0.0)
    first = max(1, count - 1)  # a single finalist is the one that would win
    chosen = [*cheapest[:first], by_score[0], *cheapest[first:], *by_score]
    return list({f.trial.number: f for f in chosen}.values())[:count]


def choose(
    finalists: Sequence[Finished], objectives: Sequence[Objective], loss: Loss
) -> tuple[Finished, bool]:
    """The winner, and whether it stays within the loss; if none does, the best score wins.

    A finalist with fewer seeds than others, since some failed, does not win by those it is left.
    """
    seeds = max(len(f.reports) for f in finalists)
    finalists = [f for f in finalists if len(f.reports) == seeds]
    least, cost = least_score(finalists, loss), cost_of(objectives)
    within = [f for f in finalists if f.score.mean >= least]
    if cost is None or not within:
        best = max(finalists, key=lambda f: f.score.mean)
        return best, best in within

    def price(entry: Finished) -> tuple[float, float]:
        value = entry.number(cost)
        return (float("inf") if value is None else value, -entry.score.mean)

    return min(within, key=price), True


def rule(
    finalists: Sequence[Finished], objectives: Sequence[Objective], loss: Loss, seeds: int
) -> str:
    """How the winner was found, in words."""
    report, cost = finalists[0].reports[0], cost_of(objectives)
    teacher = report.teacher.score if report.teacher else report.student.score
    if cost is None:
        return "Of the finalists, the one with the best mean score over its seeds wins."
    many = f"trials run again with {seeds} seeds in all" if seeds > 1 else "each of one seed"
    return RULE.format(
        seeds=many, cost=cost.name, least=least_score(finalists, loss), teacher=teacher,
        loss=loss.text,
    )  # fmt: skip


def on_front(finished: Sequence[Finished], objectives: Sequence[Objective]) -> list[bool]:
    """Which trials no other beats in all objectives; see `raybert.objectives.front`."""
    rows = [{o.name: f.number(o) for o in objectives} for f in finished]
    return front(rows, objectives)
