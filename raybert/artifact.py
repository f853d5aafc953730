"""From trained weights to the finished artifact: measure it, describe it, put it in its place."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raybert.bench import bench, count, hardware
from raybert.checkpoint import World
from raybert.compressed import finished, longest_input
from raybert.config import Recipe
from raybert.data import prepare
from raybert.errors import TransientError, UserError
from raybert.evaluate import predict
from raybert.export import export, read_export
from raybert.folders import write_whole
from raybert.metrics import floor, predictions, score
from raybert.models import (
    brought_here,
    check_head,
    check_length,
    load,
    load_tokenizer,
    model_folder,
    read_config,
)
from raybert.places import is_uri, local
from raybert.plan import Plan
from raybert.recipe_file import load_recipe
from raybert.report import model_card, write_run_report
from raybert.results import RunReport, build, read_run, with_export
from raybert.storage import push
from raybert.surgery import compressed_by
from raybert.tasks import write_submission
from raybert.train import FINAL, RESULT

CARD = "README.md"
"""The model card's name in a model folder."""


def assemble(
    plan: Plan, teacher: str | None, tell: Callable[[str], None], *, timed: bool = True
) -> RunReport:
    """Measure a trained run beside its teacher and write model/, report.json and the report's
    pages.

    Args:
        plan: the run.
        teacher: the teacher's model folder, if it had one.
        tell: gets the report's notes.
        timed: False leaves latency, and exporting, to `raybert.side_by_side`.

    Raises:
        UserError: storage refused, and the trained weights are still there; or the model could not
            be exported, and its report is written without.
    """
    recipe = plan.recipe
    final = recipe.folder / "checkpoints" / FINAL
    result = json.loads((final / RESULT).read_text(encoding="utf-8"))
    measured = _measure(recipe, final, brought_here(teacher) if teacher else None, timed)
    for text in result["notes"]:
        tell(f"note: {text}")
    models = {
        key: {"metrics": result[key], **measured["models"][key]}
        for key in ("student", "teacher")
        if result[key] is not None
    }
    position = result["position"]
    config = read_config(str(final))
    # Of a compressed model that the run started from, the same is to be said as before.
    own = {method.name for method in recipe.method}
    methods = [*(one for one in finished(config) if one.name not in own), *recipe.method]
    notes = [*plan.notes, *result["notes"]]
    notes += [text for method in methods for text in method.remarks()]
    report = build(
        name=recipe.name or "run",
        task=plan.data.task.name,
        kind=plan.data.task.kind,
        metric=plan.data.task.main,
        model=encoder_name(recipe),
        methods=[method.model_dump(mode="json") for method in methods],
        seed=recipe.train.seed,
        workers=recipe.workers,
        student=models["student"],
        teacher=models.get("teacher"),
        floors=floor(plan.data.task, plan.data, "dev"),
        training={
            "steps": position["steps"],
            "seconds": position["seconds"],
            "tokens": position["tokens"],
            "phases": position["finished"],
        },
        hardware=measured["hardware"],
        length=measured["length"],
        latency=measured["latency"],
        speedup=measured["speedup"],
        simulated=[method.name for method in methods if method.simulated],
        notes=list(dict.fromkeys(notes)),
        facts=position["facts"],
    )
    try:
        _place_model(final, recipe)
        if recipe.export and timed:
            report = _exported(report, recipe, teacher, tell)
        publish(recipe.folder, report)
    except OSError as error:
        raise TransientError(
            f"the finished model could not be written to {recipe.folder}: {error}. Make room and "
            "start the same command again; nothing is trained twice."
        ) from None
    return report


def _exported(
    report: RunReport,
    recipe: Recipe,
    teacher: str | None,
    tell: Callable[[str], None],
) -> RunReport:
    """The report with what the exported graph adds; where there is none, it is written without."""
    try:
        export(recipe.folder, recipe, against=teacher, overwrite=True, tell=tell)
    except UserError as error:
        publish(recipe.folder, report)
        raise UserError(
            f"the model is finished and its report written, but it is not exported: {error}"
        ) from None
    exported = with_export(report, read_export(recipe.folder / "onnx"))
    for note in exported.notes:
        if note not in report.notes:
            tell(f"note: {note}")
    return exported


def publish(folder: Path, report: RunReport) -> None:
    """Write a finished run's report, and with it the card of its model, which says the same.

    Args:
        folder: the run folder, with its model and recipe.
        report: what is now known of the run.
    """
    model = folder / "model"
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    plain = not compressed_by(read_config(str(model)))
    write_whole(model / CARD, model_card(report, recipe, plain=plain))
    push(model / CARD)
    write_run_report(folder, report)


def add_export(folder: Path) -> None:
    """Write a finished run's report anew, with what its ``onnx`` folder says."""
    publish(folder, with_export(read_run(folder).report, read_export(folder / "onnx")))


def encoder_name(recipe: Recipe) -> str:
    """What the run's encoder is called: a hub name, or the end of a local path.

    A teacher is called after what it was fine-tuned from, so that students of teachers that differ
    only by seed are students of one encoder.
    """
    name = recipe.model or recipe.teacher or ""
    run = Path(name).parent
    if recipe.model is None and Path(name).name == "model" and (run / "report.json").is_file():
        with contextlib.suppress(UserError):  # of another version of raybert
            made = load_recipe(str(run / "recipe.yaml"))
            name = name if made.method else made.model or name
    path = local(name) if is_uri(name) else Path(name)
    return "/".join(("...", *path.parts[-2:])) if path.is_absolute() else name


def _measure(recipe: Recipe, final: Path, teacher: Path | None, timed: bool) -> dict[str, Any]:
    """Size and FLOPs, and, timed, latency of a student beside its teacher, on rows of the longest
    ``length`` that both read, up to the recipe's."""
    configs = [read_config(str(folder)) for folder in (final, teacher) if folder is not None]
    length = min(recipe.measure.length, *map(longest_input, configs))
    if teacher is None or not recipe.measure.batches or not timed:
        models = {"student": count(final, length)}
        if teacher is not None:
            models["teacher"] = copy.deepcopy(_count_teacher(teacher, length, _stamp(teacher)))
        found = {"models": models, "latency": [], "speedup": [], "hardware": hardware()}
        return {**found, "length": length}
    shapes = [(batch, length) for batch in recipe.measure.batches]
    seconds = recipe.measure.seconds
    result = bench(final, teacher, names=("student", "teacher"), shapes=shapes, seconds=seconds)
    for sizes in result["models"].values():
        sizes.pop("path")
    return {**result, "length": length}


@functools.lru_cache(maxsize=8)
def _count_teacher(folder: Path, length: int, stamp: float) -> dict[str, Any]:
    """`count` of a teacher, once for the many students that a search makes in one process."""
    return count(folder, length)


def _stamp(folder: Path) -> float:
    """When a model folder was last written to."""
    return max(file.stat().st_mtime for file in folder.rglob("*"))


def _place_model(final: Path, recipe: Recipe) -> None:
    target, partial = recipe.folder / "model", recipe.folder / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(final, partial, ignore=shutil.ignore_patterns(RESULT))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    push(target, last="config.json")


def evaluate_model(
    model: str | Path, recipe: Recipe, split: str = "dev", submission: str | None = None
) -> dict[str, Any]:
    """Score a model folder on a task, and write predictions when asked to.

    Args:
        model: run or model folder.
        recipe: its ``task``, ``data`` and ``train.eval_batch_size`` are used.
        split: ``dev``, ``train`` or ``test``; a test split has no labels and gets no metrics.
        submission: file or folder to write predictions to, in the task's own format.

    Returns:
        ``task``, ``split``, ``rows``, ``metrics`` and ``floors``, and ``submission`` if one was
        written.

    Raises:
        UserError: the model does not fit the task, or the split is not there.
    """
    if submission is not None and recipe.task == "mlm":
        raise UserError(
            "masked language modelling has no predictions to submit; leave --submission."
        )
    if submission is not None and Path(submission).is_file():
        raise UserError(f"{submission} exists and is not overwritten; choose another --submission.")
    folder = model_folder(model)
    network: Any = load(folder)
    check_length(recipe.data, network.config, str(folder))
    data = prepare(recipe.task, recipe.data, load_tokenizer(str(folder)))
    if split not in data.splits:
        raise UserError(
            f"task {recipe.task} has no {split} rows here; there are {', '.join(data.splits)}."
        )
    check_head(str(folder), network.config, data.task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, device)
    index, outputs = predict(network.to(device), data, split, world, recipe.train.eval_batch_size)
    result: dict[str, Any] = {"task": data.task.name, "split": split, "rows": len(index)}
    if split != "test":
        result["metrics"] = score(data.task, data, split, index, outputs)
        result["floors"] = floor(data.task, data, split)
    elif submission is None:
        raise UserError(
            "test rows have no labels to score; give --submission FILE to predict them."
        )
    if submission is not None:
        answers = predictions(data.task, data, split, index, outputs)
        result["submission"] = str(write_submission(data.task, answers, submission))
    return result
