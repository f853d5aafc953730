"""The plots of a search's page. A trial's recipe shows where the mouse rests on its mark."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from raybert.finalists import Finished
from raybert.ledger import Trial
from raybert.objectives import LATENCY, Objective
from raybert.plots import COLOURS, TEACHER, pareto, svg_of
from raybert.results import RunReport, latency_ms
from raybert.search_results import Answer
from raybert.space import listed
from raybert.tables import shown

GREY = "#9aa1ad"
FRONT, FINALIST, WINNER, STOPPED = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[4]

UNITS: dict[str, tuple[float, str]] = {
    "bytes": (1e6, "weights on disk (MB)"),
    "parameters": (1e6, "parameters (millions)"),
    "flops": (1e9, "GFLOPs a row"),
    "latency": (1.0, "median latency (ms)"),
    "seconds": (1.0, "training (s)"),
}
"""Objectives as axes: what a number is divided by, and what it is called."""


def recipe_text(trial: Trial) -> str:
    """A trial's sample in one line a parameter."""
    lines = [f"{key} = {shown(value)}" for key, value in trial.values.items()]
    return "\n".join([f"trial {trial.name} ({trial.state})", *lines])


def with_hover(svg: str, key: str, trials: Sequence[Trial], more: Mapping[int, str]) -> str:
    """The element with a title in each trial's mark, which browsers show under the mouse.

    Args:
        svg: whose marks have the group id ``trial-N``.
        key: the plot's.
        trials: those that may be marked.
        more: lines to add, by trial number.
    """
    texts = {t.number: "\n".join([recipe_text(t), more.get(t.number, "")]).strip() for t in trials}

    def titled(match: re.Match[str]) -> str:
        text = texts.get(int(match[2]))
        return match[1] if text is None else f"{match[1]}<title>{escape(text)}</title>"

    return re.sub(rf'(<g id="{re.escape(key)}-trial-(\d+)">)', titled, svg)


def numbers_text(answer: Answer) -> dict[int, str]:
    """A line of each finished trial's objectives, by trial number."""
    found = {}
    for entry in answer.finished:
        values = [(o.name, entry.number(o)) for o in answer.objectives]
        text = ", ".join(f"{name} {value:.4g}" for name, value in values if value is not None)
        sd = "" if entry.score.sd is None else f" ± {entry.score.sd:.4f}"
        found[entry.trial.number] = (
            f"{text}; mean score {entry.score.mean:.4f}{sd} over {entry.score.n} seed(s)"
        )
    return found


def front_plots(answer: Answer) -> list[tuple[str, str]]:
    """(caption, SVG) of the score against each cost that finished trials have."""
    costs = [o for o in answer.objectives if o.mode == "min"]
    found = []
    for number, cost in enumerate(costs or [Objective("bytes", BYTES, "min")]):
        placed = [(f, f.number(cost)) for f in answer.finished]
        known = [(f, value) for f, value in placed if value is not None]
        if known:
            key = f"front{number}"
            scale, label = UNITS.get(cost.name, (1.0, cost.name))
            svg = svg_of(_front(answer, cost, known, scale, label), key, f"score against {label}")
            trials = [f.trial for f, _ in known]
            caption = f"Score against {label}: up and to the left is better."
            found.append((caption, with_hover(svg, key, trials, numbers_text(answer))))
    return found


BYTES = ("student", "bytes", "weights")


def _front(
    answer: Answer,
    cost: Objective,
    known: Sequence[tuple[Finished, float]],
    scale: float,
    label: str,
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        points = [(value / scale, f.reports[0].student.score) for f, value in known]
        edge = pareto(points)
        if len(edge) > 1:
            axes.step(*zip(*edge, strict=True), where="post", color=GREY, linewidth=1.2, zorder=1,
                      label="best of one seed")  # fmt: skip
        named: set[str] = set()
        for (entry, _), (x, _y) in zip(known, points, strict=True):
            what, colour, marker, size = _look(answer, entry)
            if entry.score.sd:
                axes.errorbar(x, entry.score.mean, yerr=entry.score.sd, fmt="none", ecolor=colour,
                              capsize=3, elinewidth=1.2, zorder=4)  # fmt: skip
            axes.plot(x, entry.score.mean, marker, color=colour, markersize=size, zorder=5,
                      label=None if what in named else what,
                      gid=f"trial-{entry.trial.number}")  # fmt: skip
            named.add(what)
        report = known[0][0].reports[0]
        price = _teachers(cost, report)
        if report.teacher is not None and price is not None:
            axes.plot(price / scale, report.teacher.score, "*", color=TEACHER, markersize=13,
                      label="teacher", zorder=3)  # fmt: skip
        axes.axhline(answer.least, color=WINNER, linestyle=(0, (2, 3)), linewidth=1.2,
                     label="least score")  # fmt: skip
        axes.set_xlim(left=0)
        axes.margins(y=0.12)
        axes.set(xlabel=label, ylabel=report.metric)

    return draw


def _look(answer: Answer, entry: Finished) -> tuple[str, str, str, int]:
    """What a trial is in the plot: its name in the legend, colour, marker and size."""
    number = entry.trial.number
    if number == answer.winner.trial.number:
        return "winner", WINNER, "D", 10
    if number in {f.trial.number for f in answer.finalists} and entry.score.n > 1:
        return "finalist, mean ± sd", FINALIST, "s", 8
    if number in answer.front:
        return "on the front", FRONT, "o", 8
    return "trial", GREY, "o", 6


def _teachers(cost: Objective, report: RunReport) -> float | None:
    """What the teacher costs."""
    if cost.path == (LATENCY,):
        return latency_ms(report, "teacher")
    if cost.path[0] != "student" or report.teacher is None:
        return None
    return Objective(cost.name, ("teacher", *cost.path[1:]), cost.mode).of(report)


def parallel_plot(answer: Answer) -> tuple[str, str] | None:
    """(caption, SVG): a line a trial through its parameters, coloured by score."""
    scored = [t for t in answer.trials if t.curve]
    keys = [k for k in answer.space.axes if len({json.dumps(t.values.get(k)) for t in scored}) > 1]
    if len(scored) < 2 or not keys:
        return None
    scores = [t.curve[-1][1] for t in scored]
    low, high = min(scores), max(scores)
    columns = {key: _column(answer, key, scored) for key in keys}

    def draw(axes: Axes) -> None:
        paint = colormaps["viridis"]
        for trial, score in sorted(zip(scored, scores, strict=True), key=lambda pair: pair[1]):
            share = (score - low) / (high - low) if high > low else 1.0
            places = [(n, columns[k][0].get(trial.number)) for n, k in enumerate(keys)]
            path = [(n, y) for n, y in places if y is not None] + [(len(keys), share)]
            style = "-" if trial.state == "finished" else (0, (2, 2))
            axes.plot(*zip(*path, strict=True), color=paint(0.95 * share), linestyle=style,
                      linewidth=1.6, alpha=0.85, gid=f"trial-{trial.number}")  # fmt: skip
        for n, key in enumerate([*keys, "score"]):
            axes.axvline(n, color="#c8ccd3", linewidth=1, zorder=0)
            ends = columns[key][1] if key in columns else [(0.0, low), (1.0, high)]
            # To the left of the first axis there is room: chains have long names.
            place = {"xytext": (3, 0), "ha": "left"} if n else {"xytext": (-4, 0), "ha": "right"}
            for y, value in ends:
                axes.annotate(shown(value), (n, y), fontsize=8, color="#30343b", va="center",
                              textcoords="offset points", zorder=5, **place,
                              bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none",
                                    "pad": 0.6})  # fmt: skip
        axes.set_xticks(range(len(keys) + 1), [*keys, "score"], rotation=25, ha="right", fontsize=9)
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(keys) + 0.45)
        axes.grid(False)
        axes.spines["left"].set_visible(False)

    svg = svg_of(draw, "parallel", "parameters of each trial", (10.8, 3.8))
    caption = (
        "Each line is a trial: its parameters, and its last score (bright is better). Dashed lines "
        "were stopped early; a line passes by parameters that its chain does not have."
    )
    return caption, with_hover(svg, "parallel", scored, numbers_text(answer))


def _column(
    answer: Answer, key: str, trials: Sequence[Trial]
) -> tuple[dict[int, float], list[tuple[float, Any]]]:
    """Where each trial's value lies from 0 to 1, and what to write where."""
    found = {t.number: t.values[key] for t in trials if key in t.values}
    choices = listed(answer.space.axes[key])
    if choices is None and len({json.dumps(value) for value in found.values()}) == 1:
        choices = list(found.values())[:1]  # fixed, and perhaps no number
    if choices is not None:
        step = 1 / max(1, len(choices) - 1)
        plain = [json.loads(json.dumps(value)) for value in choices]
        found = {n: json.loads(json.dumps(value)) for n, value in found.items()}
        # By what they equal: a recipe's 10.0 is the space's 10.
        return {n: plain.index(v) * step for n, v in found.items() if v in plain}, [
            (n * step, value) for n, value in enumerate(choices)
        ]
    low, high = min(found.values()), max(found.values())
    logs = low > 0 and high / low > 10

    def place(value: float) -> float:
        if high == low:
            return 0.5
        if logs:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    return {n: place(v) for n, v in found.items()}, [(0.0, low), (1.0, high)]


def importance_plot(shares: Mapping[str, float]) -> str | None:
    """Bars of how much of the scores' variance each parameter explains."""
    if not shares:
        return None
    keys = list(shares)[::-1]

    def draw(axes: Axes) -> None:
        axes.barh(range(len(keys)), [shares[key] for key in keys], color=FRONT, height=0.6)
        axes.set_yticks(range(len(keys)), keys, fontsize=9)
        axes.set_xlim(0, 1)
        axes.set(xlabel="share of the scores' variance")
        axes.grid(False, axis="y")

    return svg_of(draw, "importance", "importance of each parameter", (5.4, 0.9 + 0.34 * len(keys)))


def curves_plot(answer: Answer) -> str | None:
    """Each trial's score by percent of its steps."""
    trials = [t for t in answer.trials if len(t.curve) > 1]
    if not trials:
        return None

    def draw(axes: Axes) -> None:
        named: set[str] = set()
        for trial in trials:
            won = trial.number == answer.winner.trial.number
            what = "winner" if won else "stopped early" if trial.state == "stopped" else "trial"
            colour = {"winner": WINNER, "stopped early": STOPPED, "trial": GREY}[what]
            axes.plot(*zip(*trial.curve, strict=True), color=colour, linewidth=2.4 if won else 1.3,
                      marker="o", markersize=3, zorder=4 if won else 2, gid=f"trial-{trial.number}",
                      label=None if what in named else what)  # fmt: skip
            named.add(what)
        axes.set_xlim(0, 102)
        metric = answer.winner.reports[0].metric
        axes.set(xlabel="percent of the trial's steps", ylabel=metric)

    svg = svg_of(draw, "curves", "score by percent of each trial's steps")
    return with_hover(svg, "curves", trials, {})
