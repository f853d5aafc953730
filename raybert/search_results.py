"""What a search found: the winner's recipe, the front's, and tables of all trials."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from raybert.config import Recipe
from raybert.finalists import (
    Finished,
    Loss,
    choose,
    finalists_of,
    judged_by,
    least_score,
    on_front,
    read_finished,
    rule,
)
from raybert.folders import write_whole
from raybert.ledger import Ledger, Trial, run_folder
from raybert.objectives import Objective, in_trials
from raybert.recipe_file import dump_recipe
from raybert.space import Space, apply, sample_text

SIMULATED = "in PyTorch on this processor it saves storage and no time"
"""What it amounts to that a winner is simulated."""


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Attributes:
        folder: the search folder.
        recipe: what all trials share.
        space: what was searched.
        objectives: what counts.
        trials: all of them, skipped ones too.
        seconds: wall-clock, of all trials added up, the finalists' runs too.
        core_seconds: the same times the cores that each held.
        gpu_seconds: the same times the GPUs.
        spent: wall-clock seconds of the search over all its starts, by what it did in them; see
            `raybert.ledger.Ledger`.
        finished: those with a model.
        finalists: those that the winner was chosen from.
        winner: the trial that won.
        within: whether it stays within the loss.
        least: the score that it must reach.
        rule: how it was chosen, in words.
        front: numbers of the trials that no other beats in all objectives.
        failures: names of trials that could not be exported or timed, and why; one of them wins
            only where none could be.
        notes: what was said before the search started, and which runs could not be read.
    """

    folder: Path
    recipe: Recipe
    space: Space
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    seconds: float
    core_seconds: float
    gpu_seconds: float
    spent: Mapping[str, float]
    finished: tuple[Finished, ...]
    finalists: tuple[Finished, ...]
    winner: Finished
    within: bool
    least: float
    rule: str
    front: tuple[int, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Recipe:
        """The winner's recipe, ready for `raybert compress`."""
        return self.recipe_of(self.winner.trial, self.folder / "best")

    @property
    def model(self) -> Path:
        """The winner's model folder, as the search trained it."""
        return run_folder(self.folder, self.winner.trial.number) / "model"

    @property
    def hours(self) -> str:
        """What trials held of machines, in words."""
        found = {"core": self.core_seconds, "GPU": self.gpu_seconds}
        return ", ".join(f"{s / 3600:.2f} {what}-hours" for what, s in found.items() if s)

    def recipe_of(self, trial: Trial, out: Path) -> Recipe:
        """A trial's recipe with the measurements, the export and the resources of the search's."""
        return apply(self.recipe, trial.values, out=str(out), name=out.name)


def answer_of(
    recipe: Recipe,
    space: Space,
    objectives: tuple[Objective, ...],
    loss: Loss,
    finalists: int,
    ledger: Ledger,
    failures: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Answer:
    """The answer, from what the ledger and the run folders say; at least one trial has finished."""
    failures = failures or {}
    folder = recipe.folder
    unread: list[str] = []
    finished = read_finished(ledger, folder, unread.append)
    chosen = finalists_of(finished, in_trials(objectives), loss, finalists) or finished
    able = [entry for entry in chosen if entry.trial.name not in failures] or chosen
    judged = judged_by(finished, objectives)
    winner, within = choose(able, judged, loss)
    there = on_front(finished, judged)
    return Answer(
        folder,
        recipe,
        space,
        objectives,
        tuple(ledger.trials),
        sum(trial.seconds for trial in ledger.all),
        sum(trial.core_seconds for trial in ledger.all),
        sum(trial.gpu_seconds for trial in ledger.all),
        ledger.spent,
        tuple(finished),
        tuple(chosen),
        winner,
        within,
        least_score(chosen, loss),
        rule(able, judged, loss, finalists > 0),
        tuple(f.trial.number for f, front in zip(finished, there, strict=True) if front),
        failures,
        (*notes, *(text.removesuffix(".") for text in unread)),
    )


# -- files -----------------------------------------------------------------------------------------


def write_tables(answer: Answer) -> None:
    """Write ``best.yaml``, ``front/``, ``trials.csv`` and ``trials.parquet``."""
    folder = answer.folder
    write_whole(folder / "best.yaml", dump_recipe(answer.best))
    (folder / "front").mkdir(exist_ok=True)
    # The recipes of before alone: beside them lie the runs that were started from them.
    for recipe in (folder / "front").glob("*.yaml"):
        recipe.unlink()
    for entry in answer.finished:
        if entry.trial.number in answer.front:
            name = entry.trial.name
            recipe = answer.recipe_of(entry.trial, folder / "front" / name)
            write_whole(folder / "front" / f"{name}.yaml", dump_recipe(recipe))
    rows = table(answer)
    write_whole(folder / "trials.csv", _csv(rows))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(_columns(rows)), sink)
    write_whole(folder / "trials.parquet", sink.getvalue())


def table(answer: Answer) -> list[dict[str, Any]]:
    """A row a trial: its number, state, values, objectives, score over seeds, and what it cost."""
    finished = {entry.trial.number: entry for entry in answer.finished}
    rows = []
    for trial in answer.trials:
        entry = finished.get(trial.number)
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state}
        row |= {key: _flat(trial.values.get(key)) for key in answer.space.axes}
        for objective in answer.objectives:
            row[objective.name] = entry.number(objective) if entry else None
        row["last_score"] = trial.curve[-1][1] if trial.curve else None
        row["percent"] = trial.curve[-1][0] if trial.curve else None
        row["mean_score"] = entry.score.mean if entry else None
        row["sd_score"] = entry.score.sd if entry else None
        row["seeds"] = len(entry.reports) if entry else 0
        row["simulated"] = entry.caveat if entry else ""
        row["front"] = trial.number in answer.front
        row["winner"] = trial.number == answer.winner.trial.number
        row["trial_seconds"] = round(trial.seconds, 3)  # an objective may be called seconds
        row["cores"] = trial.cores
        row["reason"] = trial.reason
        rows.append(row)
    return rows


def _flat(value: Any) -> Any:
    """A value as a table's cell can hold it."""
    return value if value is None or isinstance(value, (int, float, str)) else json.dumps(value)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _columns(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose columns are of one type each: text where a column mixes types."""
    mixed = {
        key for key in rows[0] if len({_kind(row[key]) for row in rows if row[key] is not None}) > 1
    }
    return [
        {k: str(v) if k in mixed and v is not None else v for k, v in row.items()} for row in rows
    ]


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


# -- importance ------------------------------------------------------------------------------------


def importance(trials: Sequence[Trial], keys: Sequence[str]) -> dict[str, float]:
    """How much of the scores' variance each parameter explains by itself, from 0 to 1.

    Numbers: the square of Spearman's rank correlation with the score. Choices: the variance between
    the choices' mean scores over all variance (eta squared). Both see one parameter at a time, and
    a handful of trials says little.

    Args:
        trials: those that finished; each parameter counts over the trials that have it.
        keys: the parameters.

    Returns:
        Key to share, the largest first; keys without two different values are left out.
    """
    found = {}
    for key in keys:
        pairs = [(t.values[key], t.curve[-1][1]) for t in trials if key in t.values and t.curve]
        scores = np.array([score for _, score in pairs])
        values = [json.dumps(value) for value, _ in pairs]
        if len(set(values)) < 2 or len(pairs) < 3 or not scores.std() > 0:
            continue
        if all(type(value) in (int, float) for value, _ in pairs):
            numbers = np.array([float(value) for value, _ in pairs])
            correlation: Any = stats.spearmanr(numbers, scores)
            found[key] = float(correlation.statistic) ** 2
        else:
            found[key] = _eta_squared(values, scores)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _eta_squared(labels: Sequence[str], scores: np.ndarray) -> float:
    groups = [scores[[label == own for label in labels]] for own in set(labels)]
    between = sum(len(group) * (group.mean() - scores.mean()) ** 2 for group in groups)
    return float(between / ((scores - scores.mean()) ** 2).sum())


def summary(answer: Answer) -> str:
    """The answer in lines of text, for the terminal."""
    report = answer.winner.reports[0]
    states = [trial.state for trial in answer.trials]
    counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = [f"trials   {counted}; {len(answer.front)} on the front"]
    spread = answer.winner.score
    teacher = f"; the teacher's {report.teacher.score:.4f}" if report.teacher else ""
    lines.append(
        f"winner   trial {answer.winner.trial.name}: {report.metric} {spread.mean:.4f} over "
        f"{spread.n} seed(s){teacher}; {report.student.bytes.weights / 1e6:.1f} MB"
    )
    if answer.winner.caveat:
        lines.append(f"         {answer.winner.caveat}: {SIMULATED}")
    if not answer.within:
        lines.append("         no finalist stayed within the loss: this is the best score")
    lines.append(f"         {sample_text(answer.winner.trial.values)}")
    for name, reason in answer.failures.items():
        lines.append(f"failed   trial {name} could not be measured: {reason}")
    lines.append(f"spent    {answer.hours}, {answer.seconds / 60:.1f} minutes of trials")
    if answer.spent:
        parts = ", ".join(f"{what} {seconds / 60:.1f}" for what, seconds in answer.spent.items())
        lines.append(f"         {sum(answer.spent.values()) / 60:.1f} minutes in all ({parts})")
    return "\n".join(lines)
