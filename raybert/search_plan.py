"""A search before anything is trained: its settings, its checks, and the folder it may go on in."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from raybert.cluster import machines
from raybert.config import Recipe
from raybert.data import TaskData
from raybert.draws import ALGORITHMS, Plain, cut_grid, has_optuna, make_source
from raybert.errors import UserError
from raybert.finalists import Loss, parse_loss
from raybert.inputs import rows_digest
from raybert.ledger import SEARCH
from raybert.loggers import LOGGERS, WANDB, make_loggers
from raybert.machine import cluster_address, own_memory
from raybert.objectives import LATENCY, Objective, in_trials, parse_objectives
from raybert.places import HIDDEN, uri_of
from raybert.plan import Plan, make_plan, resolve_paths, shared_teacher
from raybert.recipe_file import dump_recipe, recipe_from
from raybert.shares import Shares, check_gpu, share_out
from raybert.space import (
    Space,
    apply,
    chain_of,
    is_fixed,
    is_grid,
    make_space,
    read_space,
    sample_text,
    space_of_methods,
)
from raybert.steering import SCHEDULERS, check_schedules, check_stopping
from raybert.teacher import teacher_digest
from raybert.yaml_file import read_yaml

TEACHER = "teacher.json"
"""The teacher's dev metrics."""

OWN = {
    *(SEARCH, TEACHER, "ledger", "trials", "finalists", "teacher", "ray"),
    *("best", "best.yaml", "front", "trials.csv", "trials.parquet", "report.html", WANDB),
}
"""What a search folder may hold."""

FREE = ("resources", "measure", "export", "workers", "out", "name", "finetune", "teacher")
"""Recipe keys that a continued search may give other values, or that are compared otherwise."""

GO_ON = {
    "space": "; or go on with the space of before, which the folder's search.yaml has in words, as "
    "a file for --space (a shipped space may change with raybert's version)",
    "how": "; or go on with what is there: --algorithm, --scheduler, --objectives",
}
"""What may be done beside, where a part of a search's identity is another than in its folder."""


@dataclass(frozen=True)
class Settings:
    """How a search goes about it.

    Attributes:
        trials: how many, skipped samples not counted.
        algorithm: ``random``, ``grid`` or ``optuna``; None: optuna where it is installed.
        scheduler: what stops bad trials early, ``none``, ``asha`` or ``median``; or ``pbt``.
        objectives: see `raybert.objectives.parse_objectives`.
        loss: how much accuracy one can afford: ``0.01`` of the metric, or ``5%`` of what the
            teacher has learned above the floor.
        finalists: how many trials are run again with other seeds; 0: none.
        seeds: how many seeds each of them has in all.
        concurrent: trials at once at most; None: as many as fit.
        gpu: GPUs of a trial of one worker, such as 0.5.
        minutes: after which nothing more is trained, the teacher's own training not counted; the
            last third is for trials under way and finalists' seeds. None: no limit.
        retries: how often a trial is tried again that crashed, or that storage, the network or
            another process ended.
        retry_failed: of an earlier start, let failed trials run again.
        loggers: ``mlflow`` and ``wandb``, beside the TensorBoard files in each trial's folder.
    """

    trials: int = 16
    algorithm: str | None = None
    scheduler: str = "none"
    objectives: str | tuple[str, ...] = "score,bytes"
    loss: str | float = "0.01"
    finalists: int = 3
    seeds: int = 3
    concurrent: int | None = None
    gpu: float = 1.0
    minutes: float | None = None
    retries: int = 2
    retry_failed: bool = False
    loggers: str | tuple[str, ...] = ()

    @property
    def logs(self) -> tuple[str, ...]:
        """The loggers, of which one may be given by its name alone."""
        return (self.loggers,) if isinstance(self.loggers, str) else tuple(self.loggers)

    @property
    def at_once(self) -> int:
        """Trials that may run at once, where there is room for them."""
        return min(self.trials, self.concurrent or self.trials)

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UserError: naming it.
        """
        for word, known, what in (
            *([(self.algorithm, ALGORITHMS, "algorithm")] if self.algorithm else []),
            (self.scheduler, SCHEDULERS, "scheduler"),
            *((logger, LOGGERS, "logger") for logger in self.logs),
        ):
            if word not in known:
                raise UserError(f"no {what} {word!r}; there are {', '.join(known)}.")
        least = {"trials": 1, "seeds": 1, "concurrent": 1, "finalists": 0, "retries": 0}
        for name, fewest in least.items():
            number = getattr(self, name)
            if number is None and name == "concurrent":
                continue
            if type(number) is not int:
                raise UserError(f"{name} is {number!r}; give a whole number.")
            if number < fewest:
                raise UserError(f"{name} is {number}; give {fewest} at least.")
        if self.minutes is not None and type(self.minutes) not in (int, float):
            raise UserError(f"minutes is {self.minutes!r}; give a number.")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"{self.minutes:g} minutes leave no time to train; give more.")
        if self.minutes is not None and self.scheduler == "pbt":
            raise UserError(
                "population-based training brings all of its trials to their ends side by side, so "
                "that minutes would end every one of them unfinished. Leave --minutes out and give "
                "fewer --trials or train.epochs, or use scheduler asha."
            )
        check_gpu(self.gpu)

    def settled(self, space: Space) -> Settings:
        """The same, with an algorithm that fits the space where none was asked for."""
        if self.scheduler == "pbt":  # it draws once, and changes what it has drawn
            return replace(self, algorithm="random")
        if self.algorithm is not None:
            return self
        grids = [is_grid(axis) for axis in space.axes.values() if not is_fixed(axis)]
        if all(grids):
            return replace(self, algorithm="grid")
        return replace(self, algorithm="random" if any(grids) or not has_optuna() else "optuna")


@dataclass(frozen=True)
class Sample:
    """A sample that was looked at before anything was trained."""

    values: dict[str, Any]
    plan: Plan | None
    reason: str


@dataclass(frozen=True)
class Search:
    """A checked search.

    Attributes:
        recipe: what all trials share, paths resolved; its `teacher` is given, or will lie in the
            search folder.
        space: what is searched.
        settings: how; its algorithm is settled.
        objectives: what the answer is judged by.
        loss: the accuracy that one can afford.
        teacher: the recipe of the teacher that is fine-tuned before, if none was given.
        samples: the first ones.
        notes: what the user should know before it starts.
    """

    recipe: Recipe
    space: Space
    settings: Settings
    objectives: tuple[Objective, ...]
    loss: Loss
    teacher: Recipe | None
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The search folder."""
        return self.recipe.folder

    @property
    def plans(self) -> list[Plan]:
        """Those of the samples that can be run."""
        return [sample.plan for sample in self.samples if sample.plan is not None]

    @property
    def data(self) -> TaskData:
        """The rows, which all trials share."""
        return self.plans[0].data

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What makes a search this one: the space, the teacher, the rows, what trials share, and
        the method of searching; how long it goes on may change. Reads the teacher's weights and
        all rows, once."""
        recipe = yaml.safe_load(dump_recipe(self.recipe))
        for key in FREE:
            recipe.pop(key)
        if self.teacher is None:
            teacher = teacher_digest(self.recipe.teacher or "")
        else:
            made = yaml.safe_load(dump_recipe(self.teacher))
            teacher = {key: made[key] for key in ("model", "task", "data", "train")}
        how = {"algorithm": self.settings.algorithm, "scheduler": self.settings.scheduler}
        how["objectives"] = ",".join(o.name for o in self.objectives)
        return {
            "space": self.space.text,
            "teacher": teacher,
            "rows": rows_digest(self.data),
            "recipe": recipe,
            "how": how,
        }


def make_search(
    recipe: Recipe,
    space: Space | Mapping[str, Any] | str | Path | None = None,
    settings: Settings | None = None,
    samples: int = 5,
) -> Search:
    """Check a search: nothing is trained, and the data is prepared.

    Args:
        recipe: what all trials share; its ``out`` is the search folder.
        space: see `raybert.space.read_space`; a dictionary is a space itself.
        settings: how to search.
        samples: how many samples are looked at.

    Raises:
        UserError: a mistake in any of them.
    """
    settings = settings or Settings()
    settings.check()
    _check_address()
    loss = parse_loss(settings.loss)
    recipe = resolve_paths(recipe)
    _check_trials(recipe)
    space = _space(space, recipe, settings)
    settings = settings.settled(space)
    looked = _look(recipe, space, samples)
    plans = [sample.plan for sample in looked if sample.plan is not None]
    if not plans:
        reasons = {sample.reason for sample in looked}
        if len(reasons) == 1:  # of the recipe, not of the space
            raise UserError(reasons.pop())
        raise UserError(
            f"none of {len(looked)} samples of space {space.name} can be run; the last: "
            f"{looked[-1].reason}"
        )
    if settings.scheduler == "pbt":
        check_schedules(space, plans)
    objectives = parse_objectives(settings.objectives, plans[0].data.task.metrics)
    _check_measured(objectives, recipe)
    source = make_source(
        settings.algorithm or "", space, recipe, in_trials(objectives), recipe.train.seed
    )
    notes = cut_grid(source, recipe, settings.trials)
    notes += check_stopping(settings.scheduler, in_trials(objectives), plans)
    make_loggers(settings.logs, recipe.folder)
    teacher = None
    if recipe.teacher is None:
        teacher = shared_teacher(recipe)
        place = str(teacher.folder / "model")
        recipe = recipe.model_copy(update={"model": None, "teacher": place})
    search = Search(recipe, space, settings, objectives, loss, teacher, looked, tuple(notes))
    if cluster_address():  # what a cluster has is known when it is connected to
        return search
    unused = unused_gpu(settings, shares_of(search), recipe.workers)
    return replace(search, notes=search.notes + unused)


def _check_address() -> None:
    """Refuse Ray's client, in which Tune's callbacks run in a process that keeps no ledger."""
    address = cluster_address() or ""
    if address.startswith("ray://"):
        raise UserError(
            f"the cluster is reached by Ray's client ({address}), and a search has to run on "
            "a machine of the cluster. Start it there with `ray job submit -- raybert tune …`, or "
            "set RAY_ADDRESS=auto on one of its machines."
        )


def _check_trials(recipe: Recipe) -> None:
    """Refuse what one run may ask for, and the trials of a search may not."""
    if recipe.fewest < recipe.workers:
        raise UserError(
            f"a search shares machines out among trials of one size; use workers={recipe.workers} "
            f"or workers={recipe.fewest}, not a range."
        )
    if uri_of(recipe.folder):
        raise UserError(
            f"{recipe.folder} is object storage, where a search cannot keep its trials: Ray Tune's "
            "files grow. Give out= a path, on storage that all machines share where there are "
            "several; model, teacher, data and data.cache may be URIs."
        )


def _space(
    given: Space | Mapping[str, Any] | str | Path | None, recipe: Recipe, settings: Settings
) -> Space:
    """The space as `make_search` takes it; nothing stands for that of the recipe's methods."""
    if isinstance(given, Space):
        return given
    if isinstance(given, Mapping):
        return make_space(given, "given", recipe)
    if given is not None:
        return read_space(str(given), recipe)
    return space_of_methods(recipe, schedules=settings.scheduler == "pbt")


def shares_of(search: Search) -> Shares:
    """What each trial gets of this machine, or of the cluster that Ray is connected to.

    Raises:
        UserError: not one fits, or not as many at once as were asked for; a cluster that was waited
            for may do with fewer.
    """
    on_cluster, settings = cluster_address() is not None, search.settings
    waited = on_cluster and search.recipe.resources.wait > 0
    here = range(torch.cuda.device_count())
    gpus = [torch.cuda.get_device_properties(number).total_memory for number in here]
    return share_out(
        search.recipe,
        machines(),
        trials=settings.at_once if waited else settings.trials,
        concurrent=None if waited else settings.concurrent,
        gpu=settings.gpu,
        memory=max(plan.memory for plan in search.plans),
        free=None if on_cluster else own_memory()[0],
        gpu_memory=None if on_cluster or not gpus else min(gpus),
    )


def unused_gpu(settings: Settings, shares: Shares, workers: int) -> tuple[str, ...]:
    """That a share of a GPU was asked for, and trials of so many workers have none to share."""
    if settings.gpu in (Settings.gpu, shares.gpu):
        return ()
    why = f"each of {workers} workers has a whole one" if shares.gpu else "trials run on CPUs here"
    return (f"--gpu {settings.gpu:g} has no effect: {why}",)


def _check_measured(objectives: tuple[Objective, ...], recipe: Recipe) -> None:
    """Refuse objectives that reports have a place for, and trials no number."""
    for objective in objectives:
        if objective.path == (LATENCY,) and not recipe.measure.batches:
            raise UserError(
                "latency is an objective, and measure.batches is empty, so that nothing is timed; "
                "give measure.batches=[1], or leave latency out."
            )
        if objective.path[0] in ("onnx", "teacher", "floor", "floors", "seed", "workers"):
            raise UserError(
                f"objective {objective.name!r} tells no trial from another: trials are not "
                "exported, and share teacher, seed and workers. Use numbers of the student."
            )


def _look(recipe: Recipe, space: Space, count: int) -> tuple[Sample, ...]:
    """The first random samples, each with its plan or why it has none."""
    source, data = Plain(space, recipe.train.seed), None
    looked: list[Sample] = []
    for number in range(count):
        values = source.ask(number)
        if values is None:
            break
        try:
            plan = plan_of(recipe, values, data)
            data = plan.data
            looked.append(Sample(values, plan, ""))
        except UserError as error:
            looked.append(Sample(values, None, str(error)))
    return tuple(looked)


def plan_of(recipe: Recipe, values: Mapping[str, Any], data: TaskData | None = None) -> Plan:
    """The plan of a sample; ``data``: its rows, where they were prepared before.

    Raises:
        UserError: it cannot be run.
    """
    trial = apply(recipe, values)
    if not chain_of(recipe, values) and not trial.kd.active:
        raise UserError(
            "nothing to compress with: give method=lobert, or a space with a key `method`."
        )
    return make_plan(trial, alone=False, data=data)


def check_place(search: Search) -> bool:
    """Whether the search folder holds this very search already, to be continued.

    Raises:
        UserError: it holds a search of another space, teacher, recipe or other rows, or anything
            else.
    """
    folder, file = search.folder, search.folder / SEARCH
    if not folder.exists() or all(path.name.startswith(HIDDEN) for path in folder.iterdir()):
        return False
    strange = [p.name for p in folder.iterdir() if p.name not in OWN and p.name[0] != "."]
    if strange or not file.is_file():
        raise UserError(
            f"{folder} is not a search folder{f' (it holds {strange[0]})' if strange else ''}; "
            "nothing in it is touched. Choose another out=."
        )
    there = read_yaml(file, "search")
    here = search.identity
    if there.get("rows", here["rows"]) != here["rows"]:  # an earlier version noted none
        raise UserError(
            f"{folder} holds a search over other rows: `data` changed since it was begun, so that "
            "new scores would not compare with those of its trials; nothing in it is touched. Put "
            f"back what was there to go on, or remove the line `rows` of {file} if that makes no "
            "difference; or choose another out=."
        )
    for key, what in (
        ("space", "space"),
        ("teacher", "teacher"),
        ("recipe", "recipe"),
        ("how", "algorithm, scheduler or objectives"),
    ):
        held = there.get(key)
        if key in ("teacher", "recipe"):
            held = _filled(held, here[key])
        if held != here[key]:
            raise UserError(
                f"{folder} holds a search of another {what}; nothing in it is touched. There: "
                f"{_short(held, here[key])}; here: {_short(here[key], held)}. Choose another out="
                f"{GO_ON.get(key, '')}."
            )
    return True


def _filled(held: Any, here: Any) -> Any:
    """Parts of a recipe as a search of an earlier version holds them, with the keys that have come
    since at their defaults; a teacher's digest as it is."""
    if not (isinstance(held, dict) and isinstance(here, dict)):
        return held
    try:
        filled = yaml.safe_load(dump_recipe(recipe_from(held)))
    except UserError:  # of another version altogether
        return held
    return {key: filled[key] for key in here}


def _short(own: Any, other: Any) -> str:
    """What one has that the other has not."""
    if isinstance(own, dict) and isinstance(other, dict):
        differing = {k: v for k, v in own.items() if other.get(k) != v or k not in other}
        return ", ".join(f"{k}: {v}" for k, v in list(differing.items())[:4]) or "less"
    return str(own)


def describe(search: Search) -> str:
    """A search in lines of text, for `--dry-run`."""
    lines = [f"search    {search.space.name}: {len(search.space.axes)} keys -> {search.folder}"]
    lines += [f"          {key}: {text}" for key, text in search.space.text.items()]
    settings = search.settings
    names = ", ".join(f"{o.mode} {o.name}" for o in search.objectives)
    lines.append(
        f"how       {settings.trials} trials by {settings.algorithm}, scheduler "
        f"{settings.scheduler}; {names}; a loss of {search.loss.text}"
    )
    again = f"{settings.finalists} finalists with {settings.seeds} seeds"
    lines.append(f"          {again if settings.finalists else 'no finalists'}")
    if cluster_address():
        lines.append("shares    of the cluster, told when the search connects to it")
    else:
        lines.append(f"shares    {shares_of(search).text(search.recipe.workers)}")
    lines += [f"note      {text}" for text in search.notes]
    for number, sample in enumerate(search.samples):
        lines.append(f"sample {number}  {sample_text(sample.values)}")
        if sample.plan is None:
            lines.append(f"          skipped: {sample.reason}")
        else:
            after, steps = sample.plan.after, sum(steps for _, steps in sample.plan.phases)
            lines.append(
                f"          {after['parameters']['total'] / 1e6:.2f}M parameters, "
                f"{after['bytes'] / 1e6:.1f} MB, {after['flops'] / 1e9:.2f} GFLOPs; {steps} steps"
            )
    return "\n".join(lines)
