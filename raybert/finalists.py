"""The end of a search: which trials are run again with other seeds, and which of them wins."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raybert.errors import UserError
from raybert.groups import Spread
from raybert.ledger import Ledger, Trial, run_folder
from raybert.objectives import LATENCY, Objective, front, in_trials
from raybert.results import RunReport, caveat, read_run

RULE = (
    "Of {those}, {seeds}, the one with the least {cost} wins whose mean score over {over} is at "
    "least {least:.4f}: the teacher's {teacher:.4f} less {loss}."
)
"""How the winner is found; the report says so."""

FINALISTS = (
    " Finalists are the trials with the least {cost} among those that reached that score once, and "
    "the one with the best score."
)
"""Which trials those are: latency is not known yet when they are chosen."""


ROUNDING = 2.0**-23
"""By how much the difference of two scores may be off: metrics are computed in float32."""


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
        """The score that a student must reach, less what rounding may take from it."""
        lost = self.amount * max(0.0, teacher - floor) if self.relative else self.amount
        return teacher - lost - ROUNDING


def parse_loss(text: str | float) -> Loss:
    """``0.01`` (of the metric) or ``5%`` (of what the teacher has learned).

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *(%?)", f"{text}".strip())
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
    """A finished trial.

    Attributes:
        trial: as the ledger has it.
        reports: of its run, and of those with further seeds that have finished.
        failed: whether one with a further seed has failed, or cannot be read.
    """

    trial: Trial
    reports: tuple[RunReport, ...]
    failed: bool = False

    @property
    def score(self) -> Spread:
        """Over its seeds."""
        found = Spread.of([report.student.score for report in self.reports])
        assert found is not None
        return found

    @property
    def caveat(self) -> str:
        """What of its compression is simulated, if anything is."""
        return caveat(self.reports)

    def number(self, objective: Objective) -> float | None:
        """An objective of its first run, which is the one that was measured."""
        return objective.of(self.reports[0])


def read_finished(
    ledger: Ledger, folder: Path, tell: Callable[[str], None] = lambda text: None
) -> list[Finished]:
    """Every trial of a search that has a finished model.

    Args:
        ledger: the search's.
        folder: the search folder.
        tell: hears of runs that have finished and cannot be read; the others count without them.
    """

    def read(trial: Trial) -> list[RunReport]:
        if trial.state != "finished":
            return []
        place = run_folder(folder, trial.number, trial.seed)
        # A trial that has ended leaves no checkpoints: there is nothing that it could go on from.
        mend = f"To train it again, remove {ledger.folder / trial.name}.json and {place}."
        try:
            return [read_run(place, mend).report]
        except UserError as error:
            tell(f"trial {trial.name} has finished and counts for nothing: {error}")
            return []

    found = []
    for trial in ledger.trials:
        again = ledger.seeds_of(trial.number)
        if own := read(trial):
            more = [read(run) for run in again]
            lost = any(
                run.state == "failed" or (run.state == "finished" and not reports)
                for run, reports in zip(again, more, strict=True)
            )
            found.append(Finished(trial, (*own, *itertools.chain(*more)), lost))
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


def contenders(finalists: Sequence[Finished]) -> list[Finished]:
    """The finalists that can win: one of which a seed failed does not by those it is left, unless
    that is so of all."""
    return [f for f in finalists if not f.failed] or list(finalists)


def even(finalists: Sequence[Finished]) -> list[Finished]:
    """Finalists with the seeds alone that all of them have: a search that is cut short ends some
    with fewer. The first is each trial's own."""
    shared = set.intersection(*({r.seed for r in f.reports[1:]} for f in finalists))
    return [
        replace(f, reports=(f.reports[0], *(r for r in f.reports[1:] if r.seed in shared)))
        for f in finalists
    ]


def choose(
    finalists: Sequence[Finished], objectives: Sequence[Objective], loss: Loss
) -> tuple[Finished, bool]:
    """The winner, and whether it stays within the loss; if none does, the best score wins.

    Finalists are compared over the seeds that all have; one whose further seeds bring it below the
    least score is not within the loss, and one without any comes after those that have some.
    """
    least, cost = least_score(finalists, loss), cost_of(objectives)
    able = contenders(finalists)
    compared = list(zip(able, even(able), strict=True))
    within = [f for f, same in compared if min(f.score.mean, same.score.mean) >= least]
    within = [f for f in within if len(f.reports) > 1] or within
    if cost is None or not within:
        best, _ = max(compared, key=lambda pair: pair[1].score.mean)
        return best, best in within

    def price(entry: Finished) -> tuple[float, float]:
        value = entry.number(cost)
        return (float("inf") if value is None else value, -entry.score.mean)

    return min(within, key=price), True


def rule(
    finalists: Sequence[Finished],
    objectives: Sequence[Objective],
    loss: Loss,
    chosen: bool = True,
) -> str:
    """How the winner was found, in words.

    Args:
        finalists: those that it was chosen from.
        objectives: by which.
        loss: what one can afford.
        chosen: whether they are finalists, and not all trials that have finished.
    """
    those = "the finalists" if chosen else "all trials that finished"
    report, cost = finalists[0].reports[0], cost_of(objectives)
    teacher = report.teacher.score if report.teacher else report.student.score
    able = contenders(finalists)
    shared = min(len(f.reports) for f in even(able))
    many = f"trials run again with {shared} seeds in all" if shared > 1 else "each of one seed"
    over = "its seeds"
    if any(len(f.reports) > shared for f in able):
        many = "not all of as many seeds"
        over = f"the {shared} seed{'s' if shared > 1 else ''} that all of them have"
        over += ", and over all of its own," if cost else ""
    if cost is None:
        text = f"Of {those}, the one with the best mean score over {over} wins."
    else:
        text = RULE.format(
            those=those, seeds=many, cost=cost.name, over=over,
            least=least_score(finalists, loss), teacher=teacher, loss=loss.text,
        )  # fmt: skip
    first = cost_of(in_trials(objectives))
    if chosen and first:
        text += FINALISTS.format(cost=first.name)
    lost = [f.trial.name for f in finalists if f not in able]
    if cost and min(len(f.reports) for f in able) == 1 < max(len(f.reports) for f in able):
        text += " One without further seeds comes after those that have some."
    if lost:
        text += f" Left out, since a seed failed or cannot be read: {', '.join(lost)}."
    return text


def on_front(finished: Sequence[Finished], objectives: Sequence[Objective]) -> list[bool]:
    """Which trials no other beats in all objectives; see `raybert.objectives.front`."""
    rows = [{o.name: f.number(o) for o in objectives} for f in finished]
    return front(rows, objectives)
