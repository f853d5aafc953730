"""What a report shows of each task: the table's cells, and the plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raybert import plots, tables
from raybert.groups import Group, Spread, group_runs, on_front
from raybert.results import Measured, Run, RunReport


@dataclass(frozen=True)
class Cell:
    """A table's cell: lines of a number and a remark beneath it."""

    lines: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, main: str, remark: str = "") -> Cell:
        """A cell of a single line."""
        return cls(((main, remark),))

    def __str__(self) -> str:
        return ", ".join(f"{main} ({remark})" if remark else main for main, remark in self.lines)


@dataclass(frozen=True)
class Row:
    """A group's line in its task's table."""

    group: Group
    seeds: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class TaskView:
    """All that is shown of one task."""

    name: str
    metric: str
    groups: tuple[Group, ...]
    batches: tuple[int, ...]
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    charts: tuple[tuple[str, str], ...]


def task_views(runs: Sequence[Run], charts: bool) -> list[TaskView]:
    """What to show of each task, in the order in which the tasks first appear."""
    names = list(dict.fromkeys(run.report.task for run in runs))
    views = []
    for number, name in enumerate(names):
        groups = group_runs([run for run in runs if run.report.task == name])
        batches = timed_batches(groups)
        front = on_front(groups)
        views.append(
            TaskView(
                name,
                groups[0].first.metric,
                tuple(groups),
                tuple(batches),
                _head(groups[0].first.metric, batches),
                tuple(_row(g, there, batches) for g, there in zip(groups, front, strict=True)),
                tuple(_charts(groups, f"t{number}")) if charts else (),
            )
        )
    return views


def timed_batches(groups: Sequence[Group]) -> list[int]:
    """Batch sizes that students were timed at, the smallest first."""
    reports = [report for group in groups if not group.is_teacher for report in group.reports]
    return sorted({row.batch for r in reports for row in r.latency if row.model == "student"})


def _head(metric: str, batches: Sequence[int]) -> tuple[str, ...]:
    return (
        f"Teacher {metric}",
        f"Student {metric}",
        "Floor",
        "Retained",
        "Ratio",
        "Parameters",
        "Weights on disk",
        "FLOPs a row",
        *(f"Speed-up, batch {batch}" for batch in batches),
        "Compression",
        "Pareto front",
    )


def _row(group: Group, front: bool, batches: Sequence[int]) -> Row:
    first, mark = group.first, Cell.of("yes" if front else "")
    own = tables.score(group.spread(lambda r: r.student.score))
    seeds = ", ".join(str(seed) for seed in sorted({r.seed for r in group.reports}))
    n = len(group.runs)
    label = f"seed {seeds}" if n == 1 else f"mean ± sd, n = {n} seeds ({seeds})"
    size = [
        _against(first, lambda m: m.parameters.total, tables.count, "fewer"),
        _against(first, lambda m: m.bytes.weights, tables.megabytes, "smaller"),
        _against(first, lambda m: m.flops, tables.count, "fewer"),
    ]
    if group.is_teacher:
        blank = Cell.of("–")
        speed = [blank] * len(batches)
        cells = [Cell.of(own), blank, Cell.of(tables.score(first.floor)), blank, blank, *size]
        return Row(group, label, (*cells, *speed, Cell.of("none"), mark))
    cells = [
        Cell.of(tables.score(group.teacher(lambda m: m.score))),
        Cell.of(own),
        Cell.of(tables.score(first.floor)),
        Cell.of(tables.percent(group.spread(lambda r: r.retained))),
        Cell.of(tables.percent(group.spread(lambda r: r.ratio))),
        *size,
        *(speed_cell(group, batch) for batch in batches),
        Cell.of(group.caveat or "real"),
        mark,
    ]
    return Row(group, label, tuple(cells))


def _against(
    report: RunReport,
    value: Callable[[Measured], int | None],
    shown: Callable[[float], str],
    word: str,
) -> Cell:
    """A size of the student, with how many times less it is than the teacher's."""
    own, theirs = value(report.student), value(report.teacher) if report.teacher else None
    if own is None:
        return Cell.of(tables.MISSING)
    if not theirs or not own:
        return Cell.of(shown(own))
    return Cell.of(shown(own), f"{theirs / own:.2f}× {word} than {shown(theirs)}")


def speed_cell(group: Group, batch: int) -> Cell:
    """The speed-ups at a batch size, a line for each backend and length that was timed."""
    found: dict[tuple[str, int], list[float | None]] = {}
    for row in (row for report in group.reports for row in report.speedup):
        if row.model == "student" and row.batch == batch:
            found.setdefault((row.backend, row.length), []).append(row.speedup)
    if not found:
        return Cell.of(tables.MISSING)
    return Cell(
        tuple(
            (tables.times(Spread.of(values)), f"{backend}, {length}\u00a0tokens")
            for (backend, length), values in found.items()
        )
    )


def speed_at(group: Group, groups: Sequence[Group], backend: str) -> str:
    """The speed-up of one backend in the first length timed, at the smallest batch that any of the
    groups of its task was timed at."""
    batches = timed_batches([g for g in groups if g.first.task == group.first.task])
    lines = speed_cell(group, batches[0]).lines if batches else ()
    missing = tables.MISSING if backend == "torch" else ""
    return next((main for main, remark in lines if remark.startswith(backend)), missing)


def _charts(groups: Sequence[Group], key: str) -> list[tuple[str, str]]:
    """(caption, SVG) of each plot that the runs have numbers for."""
    students = [group for group in groups if not group.is_teacher]
    metric = groups[0].first.metric
    found: list[tuple[str, str | None]] = []
    if students:
        found.append(
            (
                f"{metric} against size: up and to the left is better.",
                plots.cost_plot(groups, _disk, "weights on disk (MB)", f"{key}-size"),
            )
        )
    batches = timed_batches(groups)
    timed = dict.fromkeys(
        (row.backend, row.batch, row.length)
        for group in students
        for report in group.reports
        for row in report.latency
        if row.model == "student" and row.batch == batches[0]
    )
    for number, (backend, batch, length) in enumerate(timed):
        label = f"median latency, {backend}, batch {batch} × {length} tokens (ms)"
        found.append(
            (
                f"{metric} against latency: up and to the left is better.",
                plots.cost_plot(
                    groups,
                    _clock(backend, batch, length),
                    label,
                    f"{key}-latency{number}",
                ),
            )
        )
    found += [
        (
            "Training loss, each point the mean of neighbouring steps. Methods differ in what they "
            "add to it.",
            plots.curve_plot(groups, "train", "loss", f"{key}-loss"),
        ),
        (
            f"{metric} on the evaluation rows. Phases start at dotted lines, or ticks.",
            plots.curve_plot(groups, "eval", metric, f"{key}-metric"),
        ),
    ]
    found += [
        (
            f"Share of each layer that a row keeps, the mean over evaluation rows: {group.label}.",
            plots.kept_plot(group, f"{key}-kept{number}"),
        )
        for number, group in enumerate(students)
    ]
    return [(caption, svg) for caption, svg in found if svg]


def _disk(report: RunReport, who: str) -> float | None:
    measured = report.student if who == "student" else report.teacher
    return measured.bytes.weights / 1e6 if measured else None


def _clock(backend: str, batch: int, length: int) -> plots.Cost:
    def cost(report: RunReport, who: str) -> float | None:
        times = [
            row.p50_ms
            for row in report.latency
            if (row.model, row.backend, row.batch, row.length) == (who, backend, batch, length)
        ]
        return times[0] if times else None

    return cost
