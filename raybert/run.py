"""Drive a recipe: check, fine-tune the teacher, train, measure, write the artifact.

Several workers, or a cluster named by RAY_ADDRESS, get a Ray Train worker group, which
`raybert.cluster` starts; one worker without a cluster runs the same loop inside this process, with
nothing to start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybert.checks import check_command, check_folder
from raybert.cluster import predict_on_ray, ray_for, run_group, takes_gpu
from raybert.config import Recipe
from raybert.errors import TransientError, UserError
from raybert.folders import owned, write_whole
from raybert.inputs import changed, inputs_of, keep_inputs
from raybert.machine import cluster_address, own_cores
from raybert.plan import (
    Plan,
    make_plan,
    plan_predictions,
    resolve_paths,
)
from raybert.predictions import META, check_named, fault
from raybert.progress import bar
from raybert.recipe_file import dump_recipe
from raybert.storage import path_of, pull, push
from raybert.teacher import Request, check_out, check_room, find_shards, request_for, seal

if TYPE_CHECKING:
    from raybert.data import TaskData
    from raybert.job import Hooks, Job

Fit = Callable[[Plan, "Job"], dict[str, Any]]
"""Carries a job out; returns what `raybert.train.run` does."""

logger = logging.getLogger("raybert")


def finetune(recipe: Recipe, *, tell: Callable[[str], None] = print) -> Path:
    """Fine-tune `recipe.model` on the task: a recipe with no methods.

    Args:
        recipe: its `method` must be empty.
        tell: gets one line for each thing that happens.

    Returns:
        The run folder.

    Raises:
        UserError: a mistake in the recipe, the data or the machine; nothing was lost.
    """
    check_command(recipe, "finetune")
    return _drive(resolve_paths(recipe), tell)


def compress(
    recipe: Recipe,
    *,
    tell: Callable[[str], None] = print,
    fit: Fit | None = None,
    timed: bool = True,
    alone: bool = True,
    data: TaskData | None = None,
) -> Path:
    """Carry out a recipe: fine-tune a teacher when none is given, compress it, measure the result.

    The same recipe and folder continue a run that was interrupted, and return at once when
    finished.

    Args:
        recipe: with at least one method, or a `model` to be taught by a `teacher`.
        tell: gets one line for each thing that happens.
        fit: carries the training out; nothing: this process, or a Ray Train worker group.
        timed: False leaves latency, and exporting, to `raybert.side_by_side`.
        alone, data: see `raybert.plan.make_plan`.

    Returns:
        The run folder, with model/, report.json, report.html and the recipe.

    Raises:
        UserError: a mistake in the recipe, the data or the machine; nothing was lost.
    """
    check_command(recipe, "compress")
    return _drive(resolve_paths(recipe), tell, fit, timed, alone, data)


def _drive(
    recipe: Recipe,
    tell: Callable[[str], None],
    fit: Fit | None = None,
    timed: bool = True,
    alone: bool = True,
    data: TaskData | None = None,
) -> Path:
    folder = recipe.folder
    if pull(folder / "recipe.yaml"):
        pull(folder, deep=False)
    plan = make_plan(recipe, alone=alone, data=data)
    if check_folder(plan.recipe if (folder / "recipe.yaml").is_file() else recipe):
        if (folder / "report.json").is_file():
            tell(f"{folder} is finished already")
            for what in changed(folder, _inputs(plan)):
                tell(f"note: {what} changed since; the run is what they were then")
            pull(folder / "model")
            pull(folder / "onnx")
            if recipe.export and timed and not (folder / "onnx").exists():
                _export(recipe, tell)
            return folder
        tell(f"continuing {folder}")
    for text in plan.notes:
        tell(f"note: {text}")
    with owned(folder):
        _carry_out(plan, tell, fit, timed)
    return folder


def _carry_out(plan: Plan, tell: Callable[[str], None], fit: Fit | None, timed: bool) -> None:
    """Train, measure and write what is not there yet."""
    recipe, folder = plan.recipe, plan.recipe.folder
    _write_recipe(recipe)
    keep_inputs(folder, _inputs(plan))
    teacher = recipe.teacher
    if plan.teacher is not None:
        tell(f"fine-tuning the teacher {recipe.model}")
        teacher = str(_drive(plan.teacher.recipe, tell) / "model")
    if not _trained(folder):
        # One trial of many that asked the cluster for more than its own share might never get it.
        here = fit is not None or _is_local(recipe)
        _fit(plan, teacher, _predictions(plan, teacher, here, tell), fit)
    if not _trained(folder):
        final = folder / "checkpoints" / "final"
        raise UserError(
            f"the workers trained, and {final} is not here: `out` must be on storage that all "
            "machines share."
        )
    from raybert.artifact import assemble

    tell("measuring")
    assemble(plan, teacher, tell, timed=timed)


def _inputs(plan: Plan) -> dict[str, str]:
    return inputs_of(plan.data, plan.start, plan.recipe.teacher)


def _trained(folder: Path) -> bool:
    """Whether a run's finished model and its log are here; in object storage, they are brought."""
    final = folder / "checkpoints" / "final"
    if pull(final, "result.json"):
        pull(folder / "metrics.jsonl")
    return final.is_dir()


def predict_teacher(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    split: str = "train",
    cls: bool = True,
    tell: Callable[[str], None] = print,
) -> Path:
    """Save what a recipe's teacher says of every row, for `kd.predictions` to read.

    What was made before is found again; what an interruption left is gone on with.

    Args:
        recipe: its `teacher`, `task`, `data`, `workers` and `resources` are used.
        out: the folder or its URI; nothing: one in `data.cache`, where `compress` looks by itself.
        split: whose rows.
        cls: whether the [CLS] states of every layer are kept beside the logits.
        tell: gets one line for each thing that happens.

    Returns:
        The folder; `raybert.predictions.Predictions` opens it.

    Raises:
        UserError: a mistake in the recipe, the data or the machine; what was written is kept.
    """
    recipe = resolve_paths(recipe)
    folder = path_of(out).absolute() if out is not None else None
    request = plan_predictions(recipe, split, cls=cls, out=folder)
    if folder is not None:
        check_out(request)
    _predict(request, recipe, _is_local(recipe), tell)
    return request.folder


def _predictions(
    plan: Plan, teacher: str | None, here: bool, tell: Callable[[str], None]
) -> Path | None:
    """The folder of the teacher's saved predictions, made first where they are not there yet."""
    recipe = plan.recipe
    if not plan.saved or teacher is None:
        return None
    named = recipe.kd.predictions_folder
    request = request_for(
        teacher,
        plan.data,
        "train",
        cls=recipe.kd.cls > 0,
        batch_size=recipe.train.eval_batch_size,
        cache=recipe.data.cache_folder,
        out=named,
    )
    if named is None:
        _predict(request, recipe, here, tell)
    elif plan.teacher is not None:  # else the plan has looked
        check_named(named, request.identity, cls=request.cls)
    return request.folder


def _predict(request: Request, recipe: Recipe, here: bool, tell: Callable[[str], None]) -> None:
    """Make the predictions that are not there yet: in this process, or on as many workers as the
    recipe says."""
    pull(request.folder)
    reason = fault(request.folder, request.identity, cls=request.cls)
    if reason is None:
        tell(f"the teacher's predictions are there already: {request.folder}")
        return
    if (request.folder / META).exists():
        tell(f"note: predictions in {request.folder} are made again: {reason}")
    files = find_shards(request)
    missing = [shard for shard in range(request.shards) if shard not in files]
    check_room(request, len(missing))
    there = f"; {len(files)} of {request.shards} shards are there" if files else ""
    tell(f"predicting {request.rows} {request.split} rows with {request.teacher}{there}")
    make = _predict_here if here else predict_on_ray
    files |= make(request, recipe, missing) if missing else {}
    pull(request.folder)  # other machines may have made them
    seal(request, files)


def _export(recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Export a run that has finished without."""
    from raybert.artifact import add_export
    from raybert.export import export

    export(recipe.folder, recipe, tell=tell)
    add_export(recipe.folder)


def _write_recipe(recipe: Recipe) -> None:
    try:
        write_whole(recipe.folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise TransientError(
            f"cannot write to {recipe.folder}: {error}. Choose another out=."
        ) from None
    push(recipe.folder / "recipe.yaml")


# -- where it runs ---------------------------------------------------------------------------------


def _fit(plan: Plan, teacher: str | None, predictions: Path | None, fit: Fit | None = None) -> None:
    """Train all phases: one `fit()`, or the loop itself where there is nothing to distribute."""
    from raybert.job import Job

    recipe = plan.recipe
    start = teacher if plan.teacher is not None and teacher else plan.start
    keep_head = bool(recipe.method) and start == teacher
    job = Job(recipe, plan.data.folder, start, teacher, keep_head, predictions)
    returned = (fit or (_run_here if _is_local(recipe) else _run_on_ray))(plan, job)
    if "error" in returned:
        raise returned["error"]


def _is_local(recipe: Recipe) -> bool:
    """Whether this process does it all, without Ray."""
    return recipe.workers == 1 and cluster_address() is None


def _device_here(recipe: Recipe) -> Any:
    import torch

    return torch.device("cuda:0" if takes_gpu(recipe, torch.cuda.device_count()) else "cpu")


def _run_here(plan: Plan, job: Job) -> dict[str, Any]:
    return run_here(job, _LocalHooks())


def run_here(job: Job, hooks: Hooks) -> dict[str, Any]:
    """The loop in this process, as a group of one worker; returns what `raybert.train.run` does."""
    import torch

    from raybert.checkpoint import World
    from raybert.engine import alone, init_distributed
    from raybert.train import run

    device = _device_here(job.recipe)
    with alone():
        init_distributed(device, job.recipe.resources.timeout)
        # A container's limit is none that torch knows of.
        threads = job.recipe.resources.cpus or min(torch.get_num_threads(), own_cores())
        return run(job, World(0, 1, device), hooks, threads)


def _run_on_ray(plan: Plan, job: Job) -> dict[str, Any]:
    with ray_for(job.recipe) as (cpus, gpu):
        return run_group(job, cpus, gpu)


def _predict_here(request: Request, recipe: Recipe, shards: list[int]) -> dict[int, str]:
    """Shards made in this process: the name of each one's file."""
    import torch

    from raybert.teacher import Predictor

    files = {}
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.resources.cpus or before)
    # A trial's process that only watches several workers has none of their GPUs.
    on_gpu = recipe.resources.gpu is not False and torch.cuda.is_available()
    try:
        predictor = Predictor(request, torch.device("cuda:0" if on_gpu else "cpu"))
        with bar(request.rows_of(shards), "teacher", "row") as told:
            for shard in shards:
                files[shard] = predictor.write(shard)
                told.update(len(request.positions(shard)))
    finally:
        torch.set_num_threads(before)
    return files


class _LocalHooks:
    """Progress on this terminal."""

    def report(self, metrics: dict[str, Any]) -> None:
        """Nobody else is listening."""

    def saved(self, checkpoint: Path) -> None:
        """Nor for this."""

    def progress(self, total: int, label: str) -> Any:
        return bar(total, label)

    def note(self, text: str) -> None:
        logger.warning(text)
