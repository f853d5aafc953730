"""Runs that differ only by seed, as one: mean and sample standard deviation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raybert.results import Measured, Place, Run, RunReport, caveat


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of ``n`` values; ``sd`` is None for a single one."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """Of the values; None when there are none or one of them is missing."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        # The module refuses infinities and NaN, which a diverged run may well report.
        broken = not all(math.isfinite(value) for value in known)
        sd = math.nan if broken else statistics.stdev(known) if len(known) > 1 else 0.0
        return cls(sum(known) / len(known), sd if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> RunReport:
        """Any of the reports: for what all of them share."""
        return self.runs[0].report

    @property
    def reports(self) -> list[RunReport]:
        """The reports, in the order of the runs."""
        return [run.report for run in self.runs]

    @property
    def is_teacher(self) -> bool:
        """Whether these runs fine-tuned a teacher."""
        return not self.first.methods and self.first.teacher is None

    def teacher(self, value: Callable[[Measured], float | None]) -> Spread | None:
        """Mean and deviation of a number of the teachers; one that all share counts once."""
        values = [value(report.teacher) for report in self.reports if report.teacher]
        return Spread.of(values[:1] if len(set(values)) == 1 else values)

    @property
    def simulated(self) -> bool:
        """Whether any run's compression is simulated, as a whole."""
        return any(report.simulated for report in self.reports)

    @property
    def caveat(self) -> str:
        """What of the compression is simulated, if anything is."""
        return caveat(self.reports)

    @property
    def ranked(self) -> bool:
        """Whether a front may have it: nothing simulated, unless its integer graph was timed."""
        return not self.simulated or all(report.timed_integers for report in self.reports)

    def spread(self, value: Callable[[RunReport], float | None]) -> Spread | None:
        """Mean and deviation of ``value(report)`` over the runs."""
        return Spread.of([value(report) for report in self.reports])


def timed_at(groups: Sequence[Group]) -> list[Place]:
    """Where the times of a task's runs can be compared: in each backend that has timed all of them
    beside their teachers, the smallest batch with the longest rows; nothing where they have no
    shape in common, or none was timed."""
    reports = [report for report in _students(groups) if report.latency]
    timed = [report.clock("student").keys() & report.clock("teacher").keys() for report in reports]
    shared = set.intersection(*map(set, timed)) if timed else set()
    shape = min(((batch, -length) for _, batch, length in shared), default=None)
    return sorted(place for place in shared if (place[1], -place[2]) == shape)


def counted_at(groups: Sequence[Group]) -> list[Place]:
    """Where times count in the front: as `timed_at`, and nowhere if teachers are of several sizes,
    since shares of a large one's time and of a small one's are not of the same."""
    teachers = [report.teacher.parameters for report in _students(groups) if report.teacher]
    return timed_at(groups) if all(size == teachers[0] for size in teachers) else []


def clock_note(groups: Sequence[Group]) -> str:
    """In words, what time the front of a task's runs counts; nothing where none was timed."""
    if not any(report.latency for report in _students(groups)):
        return ""
    places = counted_at(groups)
    if places:
        _, batch, length = places[0]
        where = " or ".join(backend for backend, *_ in places)
        return (
            "Pareto's front: nothing else is better in score, weights on disk and time at once. "
            f"Time is that of batch {batch} × {length} tokens as a share of the teacher's, in "
            f"{where}."
        )
    why = "no shape was timed for all" if not timed_at(groups) else "teachers are of several sizes"
    return (
        "Pareto's front: nothing else is better in score and weights on disk at once. Times are "
        f"not counted, since {why}."
    )


def on_front(groups: Sequence[Group]) -> list[bool]:
    """Which groups of one task no other beats in score, bytes and time at once (Pareto's front).

    A group is beaten by another that is at least as good in all three and better in one: the mean
    score, the weights' bytes, and the median latency as a share of the teacher's, which is the same
    in whatever session it was timed: at a shape and in backends that all were timed in, in the
    fastest of them. Where there is no such shape, or teachers are of several sizes, times do not
    count; a single run that was not timed is slower than all that were. What is simulated is on
    no front, unless its graph was timed, which multiplies in integers.
    """
    places = counted_at(groups)
    costs = []
    for group in groups:
        means = [
            group.spread(lambda r: -r.ranked_score),
            group.spread(lambda r: float(r.student.bytes.weights)),
            _clock(group, groups, places),
        ]
        costs.append([value.mean if value else math.inf for value in means])

    def beaten(number: int) -> bool:
        own = costs[number]
        return any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for i, other in enumerate(costs)
            if groups[i].ranked
        )

    return [group.ranked and not beaten(i) for i, group in enumerate(groups)]


def _students(groups: Sequence[Group]) -> list[RunReport]:
    return [report for group in groups if not group.is_teacher for report in group.reports]


def _clock(group: Group, groups: Sequence[Group], places: Sequence[Place]) -> Spread | None:
    """A group's time as a share of its teacher's; a teacher's own is 1 beside its students."""
    if not group.is_teacher:
        return group.spread(lambda report: _share(report, places))
    own = group.first
    beside = [
        1.0
        for report in _students(groups)
        if report.teacher is not None
        and (report.model, report.teacher.parameters) == (own.model, own.student.parameters)
        and _share(report, places) is not None
    ]
    return Spread.of(beside)


def _share(report: RunReport, places: Sequence[Place]) -> float | None:
    student, teacher = report.clock("student"), report.clock("teacher")
    if not places or not all(place in student and place in teacher for place in places):
        return None
    return min(student[place] for place in places) / min(teacher[place] for place in places)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only by seed, teachers first, each named by what sets it apart."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.key, []).append(run)
    # sorted() is stable: within teachers and students the given order stays.
    bundles = sorted(members.values(), key=lambda bundle: bool(bundle[0].report.methods))
    heads = [bundle[0].report for bundle in bundles]
    labels = [_label(report, [r for r in heads if r is not report]) for report in heads]
    placed = [(report.task, label) for report, label in zip(heads, labels, strict=True)]
    return [
        # What differs is then only in the recipes, so that the run's name has to tell them apart.
        Group(
            f"{label} [{report.name}]" if placed.count((report.task, label)) > 1 else label,
            tuple(bundle),
        )
        for label, report, bundle in zip(labels, heads, bundles, strict=True)
    ]


def _label(report: RunReport, others: list[RunReport]) -> str:
    """The chain's name, and the model and parameters that tell it from others of that chain."""
    rivals = [r for r in others if (r.task, r.chain) == (report.task, report.chain)]
    parts = [report.model] if any(rival.model != report.model for rival in rivals) else []
    for i, method in enumerate(report.methods):
        parts += [
            f"{key}={value}"
            for key, value in method.items()
            if key != "seed" and any(rival.methods[i].get(key) != value for rival in rivals)
        ]
    return f"{report.chain} ({', '.join(parts)})" if parts else report.chain
