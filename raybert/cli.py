"""The command line. Everything that prints is here; everything heavy is imported when it is
needed."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raybert.arguments import parse, resolve_places

if TYPE_CHECKING:
    from raybert.config import Recipe

RUN_FILES = {
    *(
        "recipe.yaml",
        "inputs.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "teacher",
        "model",
        "ray",
    ),
    *("report.json", "report.md", "report.html", "onnx"),
}
"""What a run folder may hold, for `--overwrite` to remove it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for a mistake that the user can mend; 1 for a failure; 130 when interrupted, 143 when
        ended by SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no ± shows an escape
            stream.reconfigure(errors="backslashreplace")
    args = parse(argv)
    from raybert.errors import UserError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _quiet_logs()
    with _sigterm_interrupts() as ended:
        try:
            resolve_places(args)
            return COMMANDS[args.command](args)
        except (UserError, OSError) as error:
            print(f"raybert: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(
                "raybert: interrupted; the same command continues from the last checkpoint.",
                file=sys.stderr,
            )
            return 143 if ended.is_set() else 130


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[threading.Event]:
    """SIGTERM ends the command in order: a job's supervisor sends it, and so does a cloud. It is
    set when that has happened; the exception does not tell, for Ray raises it anew."""
    ended = threading.Event()

    def end(*_: object) -> None:
        ended.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield ended
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)


def _recipe(words: Sequence[str]) -> Recipe:
    from raybert.errors import UserError
    from raybert.recipe_file import load_recipe

    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UserError(
            f"one recipe at a time; found {' and '.join(names)}. Overrides are key=value."
        )
    recipe = load_recipe(names[0] if names else None, [word for word in words if "=" in word])
    if names and not Path(names[0]).expanduser().is_file():
        released = load_recipe(names[0])
        authors = released.teacher or released.model
        used = recipe.teacher or recipe.model
        if used != authors:
            _tell(f"{names[0]} holds the authors' settings for {authors}; here it runs on {used}")
    return recipe


def _train(args: argparse.Namespace) -> int:
    recipe = _recipe(args.words)
    from raybert.checks import check_command

    check_command(recipe, args.command)
    if args.print_recipe or args.dry_run:
        return _show(args, recipe)
    from raybert import run
    from raybert.report import summary_table
    from raybert.results import read_run

    if args.overwrite:
        _remove_run(recipe)
    if args.command == "finetune":
        folder = run.finetune(recipe, tell=_tell)
    else:
        folder = run.compress(recipe, tell=_tell)
    print(summary_table([read_run(folder)]))
    _print(f"model   {folder / 'model'}\nreport  {folder / 'report.html'}")
    return 0


def _show(args: argparse.Namespace, recipe: Recipe) -> int:
    from raybert.checks import check_folder
    from raybert.plan import describe, make_plan, resolve_paths
    from raybert.recipe_file import dump_recipe

    recipe = resolve_paths(recipe)
    if args.print_recipe:
        print(dump_recipe(recipe), end="")
    if args.dry_run:
        plan = make_plan(recipe)
        if not args.overwrite:
            check_folder(plan.recipe)
        _print(describe(plan))
    return 0


def _remove_run(recipe: Recipe) -> None:
    """Remove the run in the way of a new one, but only for a recipe that could run without it."""
    from raybert.errors import UserError
    from raybert.folders import owned
    from raybert.places import local
    from raybert.plan import make_plan, resolve_paths
    from raybert.storage import entries, pull, remove

    folder = recipe.folder
    there = entries(folder)
    if not there:
        return
    pull(folder / "recipe.yaml")
    # `recipe.yaml` is what users call their own file too: look at everything that would go.
    strange = [name for name in there if name not in RUN_FILES and name[0] != "."]
    if strange or not (folder / "recipe.yaml").is_file() or ".git" in there:
        raise UserError(
            f"{folder} is not a run folder, or holds more than a run"
            f"{f' ({strange[0]})' if strange else ''}; --overwrite does not remove it."
        )
    resolved = resolve_paths(recipe)
    needed = {"teacher": resolved.teacher, "model": resolved.model, **resolved.data.model_dump()}
    for key in ("teacher", "model", "source", "train", "dev", "test"):
        if needed[key] and local(needed[key]).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--overwrite would remove {folder}, and with it the {key} that this run needs, "
                f"{needed[key]}. Choose another out=."
            )
    make_plan(resolved)
    with owned(folder):
        remove(folder)


def _predict_teacher(args: argparse.Namespace) -> int:
    from raybert.predictions import Predictions
    from raybert.run import predict_teacher

    out, cls = Path(args.out) if args.out else None, not args.no_cls
    folder = predict_teacher(_recipe(args.words), out=out, split=args.split, cls=cls, tell=_tell)
    made = Predictions(folder, cls=cls)
    _print(f"predictions  {folder}\nrows         {made.rows}")
    print(f"shards       {made.shards}\nbytes        {made.bytes}")
    return 0


def _own_recipe(args: argparse.Namespace) -> Recipe:
    """A run's own recipe with the words over it, unless the words name another."""
    from raybert.recipe_file import load_recipe
    from raybert.storage import pull

    own = Path(args.model).expanduser() / "recipe.yaml"
    if pull(own) and all("=" in word for word in args.words):
        return load_recipe(str(own), args.words)
    return _recipe(args.words)


def _export(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from raybert.artifact import add_export
    from raybert.export import export, format_export, is_own, read_export
    from raybert.folders import owned
    from raybert.storage import path_of, pull

    place = path_of(args.model)
    run = pull(place / "recipe.yaml")
    recipe = _own_recipe(args) if run or args.words else None
    with owned(place) if run and not args.out else nullcontext():
        folder = export(
            args.model,
            recipe,
            out=args.out,
            against=args.against,
            int8=args.int8,
            time=not args.no_latency,
            threads=args.threads,
            overwrite=args.overwrite,
            tell=_tell,
        )
        if run and not args.out:
            assert recipe is not None
            if is_own(place, recipe, args.against):
                add_export(place)
            else:
                _tell(
                    "the run's own report is left as it was: another teacher, task or data was "
                    "named for this export"
                )
    print(format_export(read_export(folder)))
    _print(f"export  {folder}")
    return 0


def _import_ma_bert(args: argparse.Namespace) -> int:
    from raybert.import_ma_bert import import_ma_bert

    print(f"model  {import_ma_bert(args.file, args.model, args.out)}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from raybert.artifact import evaluate_model

    recipe = _own_recipe(args)
    result = evaluate_model(args.model, recipe, args.split, args.submission)
    print(json.dumps(result, indent=2))
    return 0


def _numbers(text: str, flag: str, least: int = 1) -> list[int]:
    from raybert.errors import UserError

    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UserError(
            f"{flag} {text!r} is not a list of whole numbers from {least} on; write {flag} 1,8."
        )
    return values


def _bench(args: argparse.Namespace) -> int:
    from raybert.bench import bench, format_bench
    from raybert.models import model_folder
    from raybert.storage import pull

    shapes = [
        (b, n) for n in _numbers(args.length, "--length") for b in _numbers(args.batch, "--batch")
    ]

    def place(name: str) -> Path:
        exported = Path(name).expanduser() / "onnx"
        there = args.backend == "onnx" and pull(exported) and (exported / "model.onnx").is_file()
        return exported if there else model_folder(name)

    result = bench(
        place(args.model),
        place(args.against) if args.against else None,
        shapes=shapes,
        backend=args.backend,
        threads=args.threads,
        device=args.device,
        seconds=args.seconds,
    )
    print(json.dumps(result, indent=2) if args.json else format_bench(result))
    return 0


def _report(args: argparse.Namespace) -> int:
    from raybert.report import check_out, summary_table, write_report
    from raybert.results import read_runs
    from raybert.storage import path_of, pull

    out = path_of(args.out)
    check_out(out)
    folders = [path_of(run) for run in args.runs]
    for folder in folders:
        pull(folder, deep=False)
    runs = read_runs(folders)
    _, page = write_report(runs, out)
    print(summary_table(runs))
    _print(f"report  {page}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from raybert.compare import check_place, compare, make_comparison
    from raybert.plan import describe

    seeds = _numbers(args.seeds, "--seeds", least=0) if args.seeds else []
    comparison = make_comparison(_recipe(args.words), args.chain, seeds)
    if args.dry_run:
        check_place(comparison.out)
        _print("\n\n".join(describe(plan) for plan in comparison.plans()))
        return 0
    compare(comparison, tell=_tell)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from raybert.search import run_search
    from raybert.search_plan import Settings, check_place, describe, make_search
    from raybert.search_results import summary

    settings = Settings(
        trials=args.trials,
        algorithm=args.algorithm,
        scheduler=args.scheduler,
        objectives=args.objectives,
        loss=args.loss,
        finalists=args.finalists,
        seeds=args.seeds,
        concurrent=args.concurrent,
        gpu=args.gpu,
        minutes=args.minutes,
        retries=args.retries,
        retry_failed=args.retry_failed,
        loggers=tuple(args.log),
    )
    search = make_search(_recipe(args.words), args.space, settings)
    if args.dry_run:
        check_place(search)
        print(describe(search))
        return 0
    answer = run_search(search, tell=_tell)
    print(summary(answer))
    print(f"recipe   {answer.folder / 'best.yaml'}\nmodel    {answer.model}")
    print(f"report   {answer.folder / 'report.html'}")
    return 1 if answer.failures else 0


def _demo(args: argparse.Namespace) -> int:
    from raybert.demo import run_demo, tune_demo
    from raybert.search_results import summary

    if args.tune:
        answer = tune_demo(Path(args.out or "demo-tune"), workers=args.workers, tell=_tell)
        print(summary(answer))
        print(f"report   {answer.folder / 'report.html'}")
        return 1 if answer.failures else 0
    run_demo(Path(args.out or "demo"), workers=args.workers, tell=_tell)
    return 0


def _tasks(args: argparse.Namespace) -> int:
    from raybert.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name:<16} {task.kind:<16} {', '.join(task.metrics)}")
    return 0


def _schema(args: argparse.Namespace) -> int:
    from raybert.recipe_file import recipe_schema

    print(recipe_schema())
    return 0


def _tell(text: str) -> None:
    from raybert.places import shown

    print(shown(text), file=sys.stderr, flush=True)


def _print(text: str) -> None:
    """With what lies in object storage by its URI."""
    from raybert.places import shown

    print(shown(text))


def _quiet_logs() -> None:
    """raybert's own warnings are shown; libraries speak up only for errors."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("raybert").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "finetune": _train,
    "compress": _train,
    "predict-teacher": _predict_teacher,
    "evaluate": _evaluate,
    "export": _export,
    "bench": _bench,
    "report": _report,
    "compare": _compare,
    "tune": _tune,
    "import-ma-bert": _import_ma_bert,
    "demo": _demo,
    "tasks": _tasks,
    "schema": _schema,
}
"""What carries out each command that `raybert.arguments` knows."""
