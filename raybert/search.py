"""`raybert tune`: search recipes with Ray Tune for the smallest model within a loss one can afford.

    raybert tune method=lobert task=mrpc data=glue/MRPC teacher=runs/teacher out=runs/search

A search folder holds the trials' run folders, a ledger of them, and the answer: the recipe of the
smallest model whose mean score over several seeds is within the loss, tables and one page. The
same command continues a search that was interrupted.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml

from raybert import side_by_side
from raybert.artifact import evaluate_model
from raybert.cluster import ray_up
from raybert.config import Recipe
from raybert.data import TaskData, steps_per_epoch
from raybert.draws import Plain, Source, different_points, is_walked, make_source
from raybert.errors import TransientError, UserError
from raybert.explain import nearest
from raybert.finalists import Finished, finalists_of, on_front, read_finished
from raybert.folders import owned, write_whole
from raybert.job import phase_steps, phases_of
from raybert.ledger import DONE, SEARCH, Ledger, Trial, run_folder
from raybert.loggers import make_loggers
from raybert.machine import cluster_address
from raybert.models import read_config
from raybert.objectives import LATENCY, in_trials
from raybert.places import named
from raybert.predictions import takes_saved
from raybert.recipe_file import portable
from raybert.room import check_seen, held_by_others, wait_for_room
from raybert.run import finetune, predict_teacher
from raybert.search_page import write_page
from raybert.search_plan import (
    TEACHER,
    Search,
    Settings,
    check_place,
    make_search,
    plan_of,
    shares_of,
    unused_gpu,
)
from raybert.search_results import Answer, answer_of, write_tables
from raybert.shares import Shares
from raybert.space import Space, apply
from raybert.trial import Work
from raybert.tuning import Runner

Tell = Callable[[str], None]

FIRST = 2 / 3
"""Share of the minutes in which trials may start; the rest is for those under way, and for the
finalists' seeds."""

LOOKED = 64
"""Samples that are looked at to know which of the teacher's predictions trials will read."""


def tune(
    recipe: Recipe,
    space: Space | Mapping[str, Any] | str | Path | None = None,
    *,
    tell: Tell = print,
    **settings: Any,
) -> Answer:
    """Search for the smallest model within a loss that one can afford.

    The same arguments continue a search that was interrupted; a finished one is answered again.

    Args:
        recipe: what all trials share; its ``out`` is the search folder.
        space: the name of a shipped space, a file, or a dictionary of dotted recipe keys and
            ``ray.tune`` distributions; nothing: that of the recipe's methods, or of chains.
        tell: gets one line for each thing that happens.
        settings: see `Settings`.

    Returns:
        The answer; its files lie in the search folder, and its `failures` are models that could
        not be exported or timed.

    Raises:
        UserError: a mistake in recipe, space, settings or folder, or no trial succeeded; what
            was found is kept.
    """
    known = [field.name for field in fields(Settings)]
    for name in settings:
        if name not in known:
            raise UserError(
                f"a search has no setting {name!r}{nearest(name, known)}; it has "
                f"{', '.join(known)}."
            )
    return run_search(make_search(recipe, space, Settings(**settings)), tell=tell)


def run_search(search: Search, *, tell: Tell = print) -> Answer:
    """Carry out a checked search; see `tune`."""
    settings = search.settings
    loggers = make_loggers(settings.logs, search.folder, settings.scheduler == "pbt")
    goes_on = check_place(search)
    if cluster_address() and not (goes_on or search.recipe.resources.wait):
        with ray_up():  # what does not fit the cluster is told before anything is trained
            shares = shares_of(search)
        unused = unused_gpu(settings, shares, search.recipe.workers)
        search = replace(search, notes=search.notes + unused)
    tell(f"{'continuing' if goes_on else 'searching'} {search.folder}")
    with owned(search.folder):
        return _carry_out(search, loggers, tell)


def _carry_out(search: Search, loggers: list[Any], tell: Tell) -> Answer:
    """Run, measure and answer what is not there yet."""
    settings = json.loads(json.dumps(asdict(search.settings)))  # without tuples
    held = {**search.identity, "settings": settings}
    write_whole(search.folder / SEARCH, yaml.safe_dump(held, sort_keys=False))
    ledger = Ledger(search.folder)
    ledger.remove_checkpoints()
    for text in search.notes:
        tell(f"note: {text}")
    if search.teacher is not None:
        tell("fine-tuning the teacher")
        finetune(search.teacher, tell=tell)
        ledger.spend("teacher")
    _save_predictions(search, tell)
    teacher = _teacher_metrics(search)
    ledger.spend("predictions")
    if search.settings.retry_failed:
        tell(f"{ledger.reopen_failed()} failed trials run again")
    try:
        if not _is_done(search, ledger):
            try:
                _train(search, teacher, ledger, loggers, tell)
            finally:
                ledger.spend("trials")
            ledger.remove_checkpoints()  # several workers may write one more while they are ended
        tell("measuring")
        answer = _measure(search, ledger, tell)
        ledger.spend("measuring")
    except KeyboardInterrupt:
        if read_finished(ledger, search.folder):
            write_answer(_answer(search, ledger))
            tell(f"interrupted; the best so far: {search.folder / 'best.yaml'}")
        raise
    write_answer(answer)  # its `spent` is the ledger's own, measuring and all
    return answer


def _save_predictions(search: Search, tell: Tell) -> None:
    """The teacher's predictions, once for all trials that learn from them."""
    source, plan = Plain(search.space, search.recipe.train.seed), search.plans[0]
    rows, config = len(plan.data.splits["train"]), read_config(plan.start)
    kinds = set()
    for number in range(LOOKED):
        values = source.ask(number)
        if values is None:
            break
        try:
            recipe = apply(search.recipe, values)
            kd, passes = recipe.kd, _passes(recipe, config, rows)
            if takes_saved(kd, plan.data.task.kind, passes) and kd.predictions_folder is None:
                kinds.add(kd.cls > 0)
        except UserError:
            continue  # a sample that will be skipped
    if kinds:
        # Those with [CLS] states serve trials without them too.
        predict_teacher(search.recipe, cls=True in kinds, tell=tell)


def _passes(recipe: Recipe, config: Any, rows: int) -> float:
    """How often a sample's student sees every training row, in its own phases.

    Args:
        recipe: with the sample put over it.
        config: the Hugging Face config of the model to start from.
        rows: to train on.
    """
    bound = tuple(method.bind(recipe) for method in recipe.method)
    recipe, train = recipe.model_copy(update={"method": bound}), recipe.train
    steps = sum(phase_steps(recipe, entry.phase, rows) for entry in phases_of(recipe, config))
    return steps / steps_per_epoch(rows, train.batch_size, train.accumulation, recipe.workers)


def _teacher_metrics(search: Search) -> dict[str, float]:
    """The teacher's dev metrics, once for all trials; a search that goes on has them."""
    file = search.folder / TEACHER
    if not file.is_file():
        found = evaluate_model(search.recipe.teacher or "", search.plans[0].recipe)
        write_whole(file, json.dumps(found["metrics"]))
    return json.loads(file.read_text(encoding="utf-8"))


def _train(
    search: Search, teacher: dict[str, float], ledger: Ledger, loggers: list[Any], tell: Tell
) -> None:
    """All that needs Ray: the trials, and the finalists' further seeds."""
    settings, recipe = search.settings, search.recipe
    repeats = settings.finalists > 0 and settings.seeds > 1
    source = _source(search, ledger)
    with ray_up(dashboard=recipe.workers > 1):
        shares = _find_room(search, source, ledger, tell)
        tell(shares.text(recipe.workers))
        # From here on: a cluster's machines took none of the search's minutes.
        began, seconds = time.time(), 60 * (settings.minutes or float("inf"))
        work = Work(
            _as_trials_read_it(recipe),
            search.folder,
            in_trials(search.objectives),
            shares.cpus,
            shares.gpu,
            settings.scheduler == "pbt",
            tuple(search.space.axes),
            teacher,
            cluster_address(),
            search.data.folder.name,
        )
        runner = Runner(
            work,
            shares,
            ledger,
            retries=settings.retries,
            deadline=began + seconds,
            last_start=began + seconds * (FIRST if repeats else 1),
            loggers=loggers,
            tell=tell,
        )

        check = functools.partial(_why_not, recipe, search.data)
        runner.search(source, check, settings.trials, settings.scheduler, search.space)
        left = settings.trials - ledger.ended
        if left > 0 and time.time() >= runner.last_start:
            tell(f"the time for trials is over; the same command goes on with up to {left} more")
        finished = read_finished(ledger, search.folder)
        if not finished:
            raise _nothing(ledger, search.folder)
        runner.repeat(_again(search, finished))


def _source(search: Search, ledger: Ledger) -> Source:
    """Where the search's trials come from."""
    settings, recipe = search.settings, search.recipe
    # A search that goes on must not draw again what it drew at first.
    seed = recipe.train.seed + (len(ledger.trials) if settings.algorithm == "optuna" else 0)
    objectives = in_trials(search.objectives)
    return make_source(settings.algorithm or "", search.space, recipe, objectives, seed)


def _why_not(recipe: Recipe, data: TaskData | None, values: dict[str, Any]) -> str:
    """Why a sample cannot be run, or saves nothing; nothing where it can.

    Raises:
        TransientError: storage or the network is in the way, which says nothing of the sample.
    """
    try:
        plan_of(recipe, values, data)
    except TransientError:
        raise
    except UserError as error:
        return str(error)
    return ""


def _find_room(search: Search, source: Source, ledger: Ledger, tell: Tell) -> Shares:
    """What each trial gets; a cluster first starts its machines, and all must see the search."""
    settings, minutes = search.settings, search.recipe.resources.wait
    if cluster_address():
        if minutes:
            points = different_points(source, search.recipe)  # a grid may have fewer
            trials = settings.trials if points is None else min(settings.trials, points)
            left = max(trials - ledger.ended, settings.finalists, 1)
            count = min(settings.at_once, left)
            tell(
                f"waiting up to {minutes:g} minutes for room for {count} trials at once; "
                "--concurrent asks for fewer"
            )
            wait_for_room(search.recipe, count, settings.gpu)
        check_seen(search.folder / SEARCH)
    shares = shares_of(search)
    if cluster_address() and (held := held_by_others(shares, search.recipe.workers)):
        tell(f"note: {held}")
    return shares


def _as_trials_read_it(recipe: Recipe) -> Recipe:
    """The recipe for processes elsewhere, whose working folder and environment are not this one's:
    what was made for all trials is found where it was put."""
    cache = {"cache": named(recipe.data.cache_folder)}
    return portable(recipe).model_copy(update={"data": recipe.data.model_copy(update=cache)})


def _is_done(search: Search, ledger: Ledger) -> bool:
    """Whether all that was asked for has been run, so that Ray need not be started."""
    if ledger.ended < search.settings.trials and not is_walked(_source(search, ledger), ledger):
        return False
    finished = read_finished(ledger, search.folder)
    if not finished:
        raise _nothing(ledger, search.folder)
    runs = [ledger.get(trial.number, trial.seed) for trial in _again(search, finished)]
    return all(run is not None and run.state in DONE for run in runs)


def _again(search: Search, finished: list[Finished]) -> list[Trial]:
    """The finalists' runs with further seeds: all with a second one before any has a third."""
    settings = search.settings
    objectives = in_trials(search.objectives)
    chosen = finalists_of(finished, objectives, search.loss, settings.finalists)
    first = search.recipe.train.seed
    return [
        Trial(entry.trial.number, entry.trial.values, seed=first + more)
        for more in range(1, settings.seeds)
        for entry in chosen
    ]


def _nothing(ledger: Ledger, folder: Path) -> UserError:
    """The error of a search without a single finished trial that can be read."""
    unread: list[str] = []
    read_finished(ledger, folder, unread.append)
    states = [trial.state for trial in ledger.trials]
    reasons = [*unread, *(trial.reason for trial in ledger.trials if trial.reason)]
    counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "none drawn"
    why = f"; the first reason: {reasons[0]}" if reasons else "."
    return UserError(
        f"no trial {'that has finished can be read' if unread else 'has finished'} ({counted}), so "
        f"there is no answer{why} The trials are in {folder}; the same command goes on with those "
        "that were cut short."
    )


def write_answer(answer: Answer) -> None:
    """Write all that a search folder says of its answer: recipes, tables and the page."""
    write_tables(answer)
    write_page(answer)


def _measure(search: Search, ledger: Ledger, tell: Tell) -> Answer:
    """Export and time what the answer may be, in turns and with nothing else running.

    Returns:
        The answer, without the trials that could not be.
    """
    finished = read_finished(ledger, search.folder, lambda text: tell(f"note: {text}"))
    objectives = in_trials(search.objectives)
    chosen = finalists_of(finished, objectives, search.loss, search.settings.finalists or 1)
    if any(objective.path == (LATENCY,) for objective in search.objectives):
        there = on_front(finished, objectives)
        # What was timed before is compared too, and so timed again where others come to it.
        timed = [bool(entry.reports[0].latency) for entry in finished]
        chosen += [f for f, *wanted in zip(finished, there, timed, strict=True) if any(wanted)]
    left = {run_folder(search.folder, entry.trial.number) for entry in chosen}
    measured: set[Path] = set()
    failures: dict[str, str] = {}
    while True:
        measured |= left
        able = sorted(folder for folder in measured if folder.name not in failures)
        failed = side_by_side.measure(able, search.recipe, tell)
        failures |= {folder.name: reason for folder, reason in failed.items()}
        # Without finalists, another trial wins where the one that was looked at fails.
        answer = _answer(search, ledger, failures)
        left = {run_folder(search.folder, answer.winner.trial.number)} - measured
        if not left:
            return answer


def _answer(search: Search, ledger: Ledger, failures: dict[str, str] | None = None) -> Answer:
    return answer_of(
        search.recipe,
        search.space,
        search.objectives,
        search.loss,
        search.settings.finalists,
        ledger,
        failures,
        search.notes,
    )
