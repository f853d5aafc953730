"""What one trial of a search does: a recipe, carried out by the same loop as `raybert compress`.

One worker runs inside Tune's own actor, with nothing more to start; several are a Ray Train job
that the actor only watches. Either way the trial is a run folder, which continues from its own
checkpoints when it was killed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import socket
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray import tune
from transformers.utils.logging import disable_progress_bar

from raybert.cluster import run_group
from raybert.config import Recipe
from raybert.data import find_prepared
from raybert.errors import TransientError, UserError
from raybert.job import Job
from raybert.ledger import SEARCH, run_folder
from raybert.metrics import floor
from raybert.objectives import Objective
from raybert.plan import Plan, make_plan, resolve_paths
from raybert.progress import NoBar
from raybert.recipe_file import dump_recipe, load_recipe
from raybert.results import RunReport, read_run, retained
from raybert.run import compress, run_here
from raybert.space import apply, values_of

ORIGIN = "origin.json"
"""In a checkpoint that is handed over: whose it is."""

LOG = "metrics.jsonl"

END = 600
"""Seconds that a stopped trial may take to leave its process to the next one. Ray's own patience is
2, after which it drops that next trial, and tells neither the search algorithm nor the scribe."""

POLL = 0.2
"""Seconds between looks at what the workers of a Ray Train job have reported."""


@dataclass(frozen=True)
class Work:
    """What all trials of a search share.

    Attributes:
        recipe: the base recipe, its teacher given.
        folder: the search folder.
        objectives: what is reported of a finished trial.
        cpus: of each worker.
        gpu: GPUs of each worker, or of a trial of one worker a share of one.
        hands_over: whether trials take over each other's checkpoints (population-based training).
        keys: of the space.
        teacher_metrics: the teacher's on the dev rows.
        address: of the cluster, if one was named; a machine's own cores are then no limit.
        data: the folder in data.cache of the rows that all have; where it is not to be seen, trials
            prepare them from the raw ones.
    """

    recipe: Recipe
    folder: Path
    objectives: tuple[Objective, ...]
    cpus: int
    gpu: float
    hands_over: bool
    keys: tuple[str, ...]
    teacher_metrics: dict[str, float]
    address: str | None
    data: str

    def place(self, number: int, seed: int | None) -> Path:
        """A trial's run folder."""
        return run_folder(self.folder, number, seed)

    def recipe_for(self, number: int, seed: int | None, values: Mapping[str, Any]) -> Recipe:
        """A trial's recipe: measured by `raybert.finalists` later, when the machine is idle."""
        folder = self.place(number, seed)
        keys: dict[str, Any] = {
            "name": f"trial-{folder.name}",
            "out": str(folder),
            "export": None,
            "measure": {"batches": []},
            "resources": {"cpus": self.cpus, "gpu": self.gpu > 0},
        }
        recipe = apply(self.recipe, values, **keys)
        changes: dict[str, Any] = {} if seed is None else {"seed": seed}
        if self.hands_over:
            changes["save_every"] = recipe.train.eval_every
        train = recipe.train.model_copy(update=changes)
        return recipe.model_copy(update={"train": train})


def run_trial(config: dict[str, Any], work: Work) -> None:
    """The function that Tune runs for each trial.

    Args:
        config: ``number``, ``seed`` and ``values`` of the trial; see `number_of`.
        work: what all share.
    """
    logging.disable(logging.INFO)
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    # Here, not where the search runs: it is read in this process, on whatever machine.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(END))
    if work.address is not None:
        os.environ["RAY_ADDRESS"] = work.address
    number = number_of(config, tune.get_context().get_trial_id())
    seed, values = config["seed"], dict(config["values"])
    folder = work.place(number, seed)
    if seed is not None:  # a finalist's run: its recipe stays as it is
        work = replace(work, hands_over=False)
    try:
        _check_shared(work.folder)
        if work.hands_over:
            values = _take_over(work, number, values, folder)
        recipe = work.recipe_for(number, seed, values)
        carrier = _Carrier(work, number, values)
        data = find_prepared(recipe.data, work.data)
        compress(recipe, tell=_silent, fit=carrier.fit, alone=False, data=data)
        report = read_run(folder).report
    except TransientError:
        raise  # as a crash: Tune tries it again, and it goes on from its last checkpoint
    except UserError as error:
        # Not raised: it would be tried again, to the same end.
        tune.report({"failed": str(error), "values": values})
        return
    finally:
        _give_back()
    # The finished model is in model/; what training left would fill the disk trial by trial.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    tune.report(
        {
            **results_of(report, work.objectives),
            "score": report.student.score,
            "percent": 100.0,
            "finished": True,
            "values": values,
        }
    )


def _check_shared(folder: Path) -> None:
    """Refuse to train where nobody would find the model."""
    if not (folder / SEARCH).is_file():
        raise UserError(
            f"{folder} cannot be seen from {socket.gethostname()}, where a trial runs: `out` must "
            "be on storage that all machines share, and data.cache too. When it is, the same "
            "command with --retry-failed goes on."
        )


def _give_back() -> None:
    """GPU memory that this process keeps for its next trial: others of the GPU may need it now."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def number_of(config: dict[str, Any], trial_id: str) -> int:
    """A trial's number.

    Args:
        config: its ``number``. Of a population also ``population``, the numbers of all: a trial
            that takes over from another gets that one's config, number and all.
        trial_id: Tune's, which for a population ends in the place among them.
    """
    population = config["population"]
    if population is None:
        return config["number"]
    return population[int(trial_id.rpartition("_")[2])]


def results_of(report: RunReport, objectives: tuple[Objective, ...]) -> dict[str, float]:
    """The objectives' numbers, as far as the report has them."""
    found = {objective.name: objective.of(report) for objective in objectives}
    return {name: value for name, value in found.items() if value is not None}


def _silent(text: str) -> None:
    """Trials have no terminal."""


# -- the loop, and who hears of it -----------------------------------------------------------------


class _Carrier:
    """Carries a trial's job out, and tells Tune how it gets on."""

    def __init__(self, work: Work, number: int, values: dict[str, Any]) -> None:
        self.work, self.number, self.values = work, number, values

    def fit(self, plan: Plan, job: Job) -> dict[str, Any]:
        """See `raybert.run.Fit`."""
        hooks = _TuneHooks(self, plan)
        job = replace(job, teacher_metrics=self.work.teacher_metrics)
        if plan.recipe.workers == 1:
            return run_here(job, hooks)
        return _fit_group(job, hooks, self.work)


class _TuneHooks:
    """Tells Tune of each evaluation; with the checkpoint of its step, where those are handed
    over."""

    def __init__(self, carrier: _Carrier, plan: Plan) -> None:
        self.carrier, self.folder = carrier, plan.recipe.folder
        self.total = max(1, sum(steps for _, steps in plan.phases))
        self.plan = plan
        task = plan.data.task
        self.main, self.floor = task.main, floor(task, plan.data, "dev")[task.main]
        self.last: dict[str, Any] = {}

    def report(self, metrics: dict[str, Any]) -> None:
        work = self.carrier.work
        percent = 100 * metrics["step"] / self.total
        goal = work.teacher_metrics.get(self.main)
        known = so_far(metrics, self.plan.after, float(metrics[self.main]), goal, self.floor)
        found = {o.name: o.at(known) for o in work.objectives}
        self.last = {
            **{name: value for name, value in found.items() if value is not None},
            "score": known["student"]["score"],
            "percent": percent,
            "step": metrics["step"],
            "values": self.carrier.values,
        }
        # What has trained to the end is not stopped any more: the finished model is reported next.
        if percent < 100 and not work.hands_over:
            tune.report(self.last)

    def saved(self, checkpoint: Path) -> None:
        if not (self.carrier.work.hands_over and self.last and self.last["percent"] < 100):
            return
        handed = self.folder / ".handed-over"
        shutil.rmtree(handed, ignore_errors=True)
        shutil.copytree(checkpoint, handed, copy_function=_link)
        shutil.copyfile(self.folder / LOG, handed / LOG)
        origin = {"number": self.carrier.number, "checkpoint": checkpoint.name}
        (handed / ORIGIN).write_text(json.dumps(origin))
        try:
            tune.report(self.last, checkpoint=tune.Checkpoint.from_directory(handed))
        finally:
            shutil.rmtree(handed, ignore_errors=True)

    def progress(self, total: int, label: str) -> Any:
        return NoBar()

    def note(self, text: str) -> None:
        """The run's report has it."""


def so_far(
    metrics: Mapping[str, Any],
    after: Mapping[str, Any],
    score: float,
    goal: float | None,
    floor: float,
) -> dict[str, Any]:
    """As much of a trial's report as is known at an evaluation: `raybert.objectives.RUNNING`.

    Args:
        metrics: of the evaluation, with the run's ``step``, ``seconds`` and ``tokens`` so far.
        after: what the finished model will be, as `raybert.plan.Plan` has it.
        score: the main metric.
        goal: the teacher's, if there is one.
        floor: that of a model that has learned nothing.
    """
    return {
        "student": {
            "score": score,
            "metrics": metrics,
            "parameters": after["parameters"],
            "bytes": {"weights": after["bytes"]},
            "flops": after["flops"],
        },
        "retained": None if goal is None else retained(score, goal, floor),
        "ratio": score / goal if goal else None,
        "training": {
            "seconds": metrics["seconds"],
            "steps": metrics["step"],
            "tokens": metrics["tokens"],
        },
    }


def _link(source: str, target: str) -> None:
    """A second name for a checkpoint's file, which is never written again; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# -- several workers -------------------------------------------------------------------------------


def _fit_group(job: Job, hooks: _TuneHooks, work: Work) -> dict[str, Any]:
    """A Ray Train job in a thread, while this one passes on what it reports."""
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options={"num_cpus": 0})
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["result"] = run_group(
                job, work.cpus, work.gpu > 0, [_relay(queue)], work.hands_over
            )
        except BaseException as error:  # raised again below, where Tune sees it
            ended["error"] = error

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive() or not queue.empty():
        with contextlib.suppress(Empty):
            told = queue.get(timeout=POLL)
            if "checkpoint" in told:
                hooks.saved(Path(told["checkpoint"]))
            else:
                hooks.report(told)
    if "error" in ended:
        raise ended["error"]
    return ended["result"]


def _relay(queue: Any) -> Any:
    from ray.train import UserCallback

    class Relay(UserCallback):
        """Passes on what the first worker reports; it runs in Ray Train's controller."""

        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            queue.put(dict(metrics[0]))

    return Relay()


# -- population-based training ---------------------------------------------------------------------


def _take_over(work: Work, number: int, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Put the checkpoint that Tune hands over into the trial's run folder, if it is another's.

    Returns:
        The values that the trial goes on with.
    """
    held = folder / "recipe.yaml"
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        # A search that was killed: the run folder knows better than the ledger what was changed.
        return values_of(load_recipe(str(held)), work.keys) if held.is_file() else values
    with checkpoint.as_directory() as place:
        origin = json.loads((Path(place) / ORIGIN).read_text(encoding="utf-8"))
        if origin["number"] == number and held.is_file():
            return values_of(load_recipe(str(held)), work.keys)
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        target = partial / "checkpoints" / origin["checkpoint"]
        shutil.copytree(place, target, ignore=shutil.ignore_patterns(LOG, ORIGIN))
        shutil.copyfile(Path(place) / LOG, partial / LOG)
    recipe = resolve_paths(work.recipe_for(number, None, values))
    data = find_prepared(recipe.data, work.data)
    recipe = make_plan(recipe, alone=False, data=data).recipe
    (partial / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return values
