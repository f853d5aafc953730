"""Plots as inline SVG: text stays text, and the same numbers give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raybert.config import KEPT_SHARE
from raybert.groups import Group, Spread
from raybert.results import Run, RunReport

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
"""Okabe and Ito's palette, told apart by colour-blind eyes too; markers differ as well."""

TEACHER = "#111111"

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

BINS = 60
"""Points of a loss curve a phase: each is the mean of its logged steps."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raybert",
    # A name that holds a dollar sign is a name, not a formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": "#555b66",
    "ytick.color": "#555b66",
    "text.color": "#30343b",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

Draw = Callable[[Axes], None]

Cost = Callable[[RunReport, str], float | None]
"""What a report's ``student`` or ``teacher`` costs; None where that was not measured."""


def look(groups: Sequence[Group], group: Group) -> tuple[str, str]:
    """A group's colour and marker, the same in all plots of its task; teachers are black."""
    if group.is_teacher:
        return TEACHER, "*"
    number = [g for g in groups if not g.is_teacher].index(group)
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


@dataclass(frozen=True)
class Placed:
    """A group's place in a plot of score against cost."""

    group: Group
    x: Spread
    y: Spread


def cost_plot(groups: Sequence[Group], cost: Cost, xlabel: str, key: str) -> str | None:
    """Score against a cost: a group's mean with one deviation, teachers, floor and Pareto front.

    Args:
        groups: of one task.
        cost: the number on the x axis.
        xlabel: what the cost is, with its unit.
        key: a word that no other plot of the page has.

    Returns:
        The SVG element, or None when no group of students has that cost.
    """
    placed = list(_placed([group for group in groups if not group.is_teacher], cost))
    if not placed:
        return None
    teachers = _teachers([place.group for place in placed], cost)
    metric = placed[0].group.first.metric

    def draw(axes: Axes) -> None:
        # A simulated compression has not reached its place, so it beats nothing.
        real = [(p.x.mean, p.y.mean) for p in placed if p.group.ranked]
        _front(axes, [*teachers, *real])
        for floor in sorted({place.group.first.floor for place in placed}):
            axes.axhline(floor, color="#8a8f98", linestyle=(0, (2, 3)), linewidth=1.2)
            axes.annotate("floor", (1, floor), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", fontsize=9, color="#6b717c")  # fmt: skip
        if teachers:
            axes.plot(*zip(*teachers, strict=True), "*", color=TEACHER, markersize=13,
                      label="teacher", zorder=3)  # fmt: skip
        for place in placed:
            colour, marker = look(groups, place.group)
            axes.errorbar(
                place.x.mean, place.y.mean, xerr=place.x.sd, yerr=place.y.sd, fmt=marker,
                color=colour, markerfacecolor="white" if place.group.simulated else colour,
                markersize=8, capsize=3, elinewidth=1.2, label=legend_name(place.group), zorder=4,
            )  # fmt: skip
        axes.set_xlim(0, max(x for x, _ in [*teachers, *((p.x.mean, 0) for p in placed)]) * 1.12)
        axes.margins(y=0.12)
        axes.set(xlabel=xlabel, ylabel=metric)

    return svg_of(draw, key, f"{metric} against {xlabel}")


def _placed(groups: Sequence[Group], cost: Cost) -> Iterator[Placed]:
    for group in groups:
        x = group.spread(lambda report: cost(report, "student"))
        y = group.spread(lambda report: report.student.score)
        if x and y and math.isfinite(y.mean):
            yield Placed(group, x, y)


def _teachers(groups: Sequence[Group], cost: Cost) -> list[tuple[float, float]]:
    """Where the students' teachers lie, (cost, score), each once."""
    found: dict[float, list[float]] = {}
    for report in (report for group in groups for report in group.reports):
        x = cost(report, "teacher")
        if x is not None and report.teacher is not None:
            found.setdefault(report.teacher.score, []).append(x)
    # The same teacher timed again differs by the noise of the clock: the mean stands for it.
    return [(sum(xs) / len(xs), score) for score, xs in sorted(found.items())]


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    front = pareto(points)
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color="#9aa1ad", linewidth=1.3,
                  label="Pareto front", zorder=1)  # fmt: skip


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) points that no cheaper one equals or beats, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def legend_name(group: Group) -> str:
    """A group's label, cut to fit, with what must not be missed about it."""
    label = group.label if len(group.label) <= 44 else group.label[:43] + "…"
    return f"{label} — {group.caveat}" if group.caveat else label


@dataclass(frozen=True)
class PhaseCurve:
    """A quantity in one phase; steps count through from the run's start."""

    name: str
    start: int
    points: tuple[tuple[float, float], ...]


def curve_plot(groups: Sequence[Group], kind: str, quantity: str, key: str) -> str | None:
    """One quantity by optimiser step: a line a run, a colour a group.

    Where all runs have the same phases these are named above dotted lines, elsewhere a tick starts
    a phase.

    Args:
        groups: of one task.
        kind: ``train`` or ``eval``, the kind of line to take from ``metrics.jsonl``.
        quantity: the line's key, for example ``loss``.
        key: a word that no other plot of the page has.

    Returns:
        The SVG element, or None when no run has logged it.
    """
    lines = [(group, curve(run, kind, quantity)) for group in groups for run in group.runs]
    lines = [(group, phases) for group, phases in lines if any(p.points for p in phases)]
    if not lines:
        return None
    shared = len({tuple((p.name, p.start) for p in phases) for _, phases in lines}) == 1

    def draw(axes: Axes) -> None:
        named = set()
        for group, phases in lines:
            colour, _ = look(groups, group)
            points = [point for phase in phases for point in phase.points]
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, alpha=0.8,
                      marker="o" if kind == "eval" else "", markersize=3.5,
                      label=None if group.label in named else legend_name(group))  # fmt: skip
            named.add(group.label)
            starts = [p.points[0] for p in phases[1:] if p.points]
            if starts and not shared:
                axes.plot(*zip(*starts, strict=True), "|", color=colour, markersize=13, mew=1.8)
        if shared:
            _name_phases(axes, lines[0][1])
        axes.set_xlim(left=0)
        label = quantity if kind == "eval" else f"training {quantity}"
        axes.set(xlabel="optimiser step", ylabel=label)

    return svg_of(draw, key, f"{quantity} by optimiser step")


def _name_phases(axes: Axes, phases: Sequence[PhaseCurve]) -> None:
    for phase in phases:
        if phase.start:
            axes.axvline(phase.start, color="#8a8f98", linestyle=(0, (2, 3)), linewidth=1.2)
        axes.annotate(phase.name, (phase.start, 1), xycoords=("data", "axes fraction"),
                      xytext=(4, 3), textcoords="offset points", fontsize=9,
                      color="#6b717c")  # fmt: skip


def curve(run: Run, kind: str, quantity: str) -> list[PhaseCurve]:
    """A quantity's points, phase by phase.

    Training values are averaged into at most ``BINS`` points a phase. Of a step logged twice,
    because a phase was begun again after a failure, the later line counts.
    """
    ends: dict[int, int] = {}
    names: dict[int, str] = {}
    values: dict[int, dict[int, float]] = {}
    for line in run.metrics:
        if line["kind"] not in ("train", "eval"):
            continue
        phase, step = line["phase_index"], line["step"]
        ends[phase], names[phase] = line["total"], line["phase"]
        value = line.get(quantity)
        if line["kind"] == kind and value is not None and math.isfinite(value):
            values.setdefault(phase, {})[step] = value
    curves, start = [], 0
    for phase in sorted(ends):
        points: list[tuple[float, float]] = sorted(
            (start + step, value) for step, value in values.get(phase, {}).items()
        )
        binned = _binned(points) if kind == "train" else points
        curves.append(PhaseCurve(names[phase], start, tuple(binned)))
        start += ends[phase]
    return curves


def _binned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    size = math.ceil(len(points) / BINS) or 1
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def kept_plot(group: Group, key: str) -> str | None:
    """The share of each layer's parts that rows keep: a bar for each part, the mean over seeds.

    Args:
        group: runs whose facts may tell it (`KEPT_SHARE`).
        key: a word that no other plot of the page has.

    Returns:
        The SVG element, or None when they tell nothing.
    """
    names = [name for facts in group.first.facts.values() for name in facts.get(KEPT_SHARE, {})]
    if not names:
        return None
    places = [name.removeprefix("layer ").split(" ", 1) for name in names]
    layers = sorted({int(layer) for layer, _ in places})
    parts = list(dict.fromkeys(part for _, part in places))

    def draw(axes: Axes) -> None:
        for number, part in enumerate(parts):
            spreads = [group.spread(_kept(f"layer {layer} {part}")) for layer in layers]
            found = [(n, s) for n, s in zip(layers, spreads, strict=True) if s is not None]
            offset = (number - (len(parts) - 1) / 2) * 0.8 / len(parts)
            several = all(s.sd is not None for _, s in found)
            axes.bar([n + offset for n, _ in found], [s.mean for _, s in found],
                     width=0.8 / len(parts), color=COLOURS[number % len(COLOURS)], label=part,
                     yerr=[s.sd for _, s in found] if several else None, capsize=2)  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_xticks(layers)
        axes.set(xlabel="layer", ylabel="kept share")

    return svg_of(draw, key, f"kept share of each layer, {group.label}")


def _kept(name: str) -> Callable[[RunReport], float | None]:
    def share(report: RunReport) -> float | None:
        tables = (facts.get(KEPT_SHARE, {}) for facts in report.facts.values())
        return next((table[name] for table in tables if name in table), None)

    return share


def svg_of(draw: Draw, key: str, title: str, size: tuple[float, float] = (5.4, 3.4)) -> str:
    """A plot as an SVG element for a page.

    Args:
        draw: draws into the axes it is given.
        key: a word that no other plot of the page has; ids in the element begin with it.
        title: what is read aloud.
        size: in inches, without the legend.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        columns = 1 if max((len(label) for label in labels), default=0) > 26 else 2
        # A long legend makes the figure taller rather than the plot flatter.
        figure.set_figheight(size[1] + 0.22 * math.ceil(len(labels) / columns))
        if labels:
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        text = _write(figure)
        plt.close(figure)
    return _inline(text, key, title)


def _write(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _inline(svg: str, key: str, title: str) -> str:
    """Make a standalone SVG fit for a page: no header, no name spaces, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace(' id="', f' id="{key}-')
    svg = svg.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    head = f'<svg role="img" aria-label="{escape(title)}"'
    # The page's width rules; the view box keeps the proportions.
    svg = re.sub(r'^<svg( width="[^"]*"| height="[^"]*")*', lambda _: head, svg)
    return re.sub(r'^(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg).strip()
