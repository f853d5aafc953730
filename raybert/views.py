"""What a report shows of each task: the table's cells, and the plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raybert import plots, tables
from raybert.groups import Group, Spread, clock_note, group_runs, on_front, timed_at
from raybert.results import Measured, Place, Run, RunReport


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
    note: str
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
                clock_note(groups) if len(groups) > 1 else "",
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
        _against(group, lambda m: m.parameters.total, tables.count, "fewer"),
        _weights(group),
        _flops(group),
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
    group: Group,
    value: Callable[[Measured], float | None],
    shown: Callable[[Spread], str],
    word: str,
) -> Cell:
    """A size of the students, with how many times less it is than the teachers'."""
    own, theirs = group.spread(lambda report: value(report.student)), group.teacher(value)
    if own is None:
        return Cell.of(tables.MISSING)
    if not theirs or not theirs.mean or not own.mean:
        return Cell.of(shown(own))
    return Cell.of(shown(own), f"{theirs.mean / own.mean:.2f}× {word} than {shown(theirs)}")


def _flops(group: Group) -> Cell:
    """FLOPs of a row, and of how many tokens: a model may read no more than its own number."""
    cell = _against(group, lambda m: m.flops, tables.count, "fewer")
    ((value, compared),) = cell.lines
    if value == tables.MISSING or not group.first.length:
        return cell
    tokens = f"{group.first.length}\u00a0tokens"
    return Cell.of(value, f"{compared}; {tokens}" if compared else tokens)


def _weights(group: Group) -> Cell:
    """Bytes of weights, and of those without embeddings where the reports tell them apart."""
    whole = _against(group, lambda m: m.bytes.weights, tables.megabytes, "smaller")
    rest = _against(group, lambda m: m.bytes.rest, tables.megabytes, "smaller")
    (value, compared), *_ = rest.lines
    if value == tables.MISSING:
        return whole
    less = compared.partition(" than ")[0]
    return Cell((*whole.lines, (value, f"{less} without embeddings".strip())))


def speed_cell(group: Group, batch: int) -> Cell:
    """The speed-ups at a batch size, a line for each backend and length that was timed."""
    found = {place: value for place, value in _speedups(group).items() if place[1] == batch}
    if not found:
        return Cell.of(tables.MISSING)
    return Cell(
        tuple(
            (tables.times(value), f"{backend}, {length}\u00a0tokens")
            for (backend, _, length), value in found.items()
        )
    )


def _speedups(group: Group) -> dict[Place, Spread | None]:
    found: dict[Place, list[float | None]] = {}
    for row in (row for report in group.reports for row in report.speedup):
        if row.model == "student":
            found.setdefault((row.backend, row.batch, row.length), []).append(row.speedup)
    return {place: Spread.of(values) for place, values in found.items()}


def speed_at(group: Group, groups: Sequence[Group], backend: str) -> str:
    """The speed-up of one backend at the shape that all runs of its task were timed at; where there
    is none, at a shape of its own, which is named."""
    shared = timed_at([g for g in groups if g.first.task == group.first.task])
    own = {place: value for place, value in _speedups(group).items() if place[0] == backend}
    for place in own:
        if shared and place[1:] == shared[0][1:]:
            return tables.times(own[place])
    if shared or not own:
        return tables.MISSING if backend == "torch" else ""
    (_, batch, length), value = min(own.items(), key=lambda item: item[0])
    return f"{tables.times(value)} ({batch} × {length})"


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
    timed: dict[Place, None] = dict.fromkeys(
        (row.backend, row.batch, row.length)
        for group in students
        for report in group.reports
        for row in report.latency
        if row.model == "student" and row.batch == batches[0]
    )
    for number, (backend, batch, length) in enumerate(timed):
        place = backend, batch, length
        together = _in_turns(students, place)
        unit = "(ms)" if together else "(share of the teacher's)"
        label = f"median latency, {backend}, batch {batch} × {length} tokens {unit}"
        cost = _clock(place, share=not together)
        found.append(
            (
                f"{metric} against latency: up and to the left is better.",
                plots.cost_plot(groups, cost, label, f"{key}-latency{number}"),
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


def _in_turns(students: Sequence[Group], place: Place) -> bool:
    """Whether all were timed in one session: it has one time of the teacher."""
    clocks = [report.clock("teacher") for group in students for report in group.reports]
    return len({clock[place] for clock in clocks if place in clock}) == 1


def _clock(place: Place, *, share: bool) -> plots.Cost:
    def cost(report: RunReport, who: str) -> float | None:
        time, teacher = report.clock(who).get(place), report.clock("teacher").get(place)
        if time is None or not share:
            return time
        return time / teacher if teacher else None

    return cost
