"""A search's page: one self-contained HTML file, which loads nothing and runs no script."""

from __future__ import annotations

from typing import Any

from raybert import tables
from raybert.folders import write_whole
from raybert.pages import render
from raybert.recipe_file import dump_recipe
from raybert.search_plots import curves_plot, front_plots, importance_plot, parallel_plot
from raybert.search_results import SIMULATED, Answer, importance, table

IMPORTANCE = (
    "How much of the scores' variance each parameter explains by itself: for numbers the square of "
    "Spearman's rank correlation with the score, for choices the variance between their mean "
    "scores (eta squared). Both see one parameter at a time, over trials that ran to their end; a "
    "handful of trials says little."
)

LATENCY = (
    "Sizes and FLOPs are those of the finished models. Latency is timed after the search, all of "
    "them in turns with the teacher and nothing else running, for the finalists (and, where it is "
    "an objective, for all that no other beats in score and FLOPs): trials that run side by side "
    "would slow each other's clocks."
)


def write_page(answer: Answer) -> None:
    """Write ``report.html`` into the search folder."""
    write_whole(answer.folder / "report.html", page(answer))


def page(answer: Answer) -> str:
    """The page as text."""
    rows = table(answer)
    ended = [entry.trial for entry in answer.finished]
    states = [trial.state for trial in answer.trials]
    return render(
        "search.html",
        answer=answer,
        title=answer.folder.name,
        report=answer.winner.reports[0],
        counted={state: states.count(state) for state in dict.fromkeys(states)},
        fronts=front_plots(answer),
        parallel=parallel_plot(answer),
        importance=importance_plot(importance(ended, list(answer.space.axes))),
        importance_note=IMPORTANCE,
        latency_note=LATENCY,
        simulated_note=SIMULATED,
        curves=curves_plot(answer),
        head=list(rows[0]),
        rows=rows,
        cell=_cell,
        recipe=dump_recipe(answer.best),
        space=answer.space.text,
        machine=answer.winner.reports[0].hardware,
    )


def _cell(value: Any) -> str:
    """A number or word as the table of trials shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and abs(value) >= 1e5:
        return tables.count(value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)
