"""Finished runs, seeds taken together, as one result file for one of the README's tables.

    python tests/benchmarks/quality.py runs/mrpc-theseus-1 runs/mrpc-theseus-2 ...
    python tests/benchmarks/quality.py --name bits runs/mrpc-8-bits runs/mrpc-4-bits ...
    python tests/benchmarks/quality.py --add runs/mrpc-theseus-3 ...

Nothing is measured here: the numbers are those of each run's ``report.json``, and so are hardware
and dates. With ``--add``, more seeds join the groups that the file has already, those of the same
commands; the runs that it was made from need not be there any more.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, shown_path, today, write_json

from raybert.groups import Group, Spread, group_runs
from raybert.methods import METHODS
from raybert.plan import DEMO_ENCODER
from raybert.recipe_file import recipe_from
from raybert.results import Measured, Run, RunReport, read_run

DEMO_NAME = "MiniLM-L6-H384 (demo extra)"
LEFT_OUT = {"name", "out", "resources", "method", "measure"}
"""Recipe keys that say nothing about the result, or are written in a way of their own."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="finished runs as results/NAME.json")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--name", default="quality", help="table: quality, or a comparison within a method"
    )
    parser.add_argument("--told", help="what tells these runs from others of their chain")
    parser.add_argument("--add", action="store_true", help="keep what the file has, add seeds")
    return parser.parse_args()


# -- recipes ---------------------------------------------------------------------------------------


def teacher_recipe(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The recipe that a run's teacher was fine-tuned with, where it is still to be found."""
    given = recipe.get("teacher")
    homes = [Path(given), Path(given).parent] if given else [folder / "teacher"]
    for home in homes:
        if (home / "recipe.yaml").is_file():
            return yaml.safe_load((home / "recipe.yaml").read_text(encoding="utf-8"))
    return None


def is_demo_encoder(model: str) -> bool:
    """Whether a path is the encoder that is taken when no other is named."""
    return DEMO_ENCODER in Path(model).parts


def encoder_of(recipe: dict[str, Any], teacher: dict[str, Any] | None, otherwise: str) -> str:
    """The pretrained encoder that a run goes back to, named without a machine's paths."""
    model = recipe.get("model") or (teacher or {}).get("model") or otherwise
    if is_demo_encoder(model):
        return DEMO_NAME
    return shown_path(model) if Path(model).is_absolute() else model


def differing(recipe: dict[str, Any]) -> dict[str, Any]:
    """The keys whose values are not the defaults, dotted."""
    defaults = recipe_from({}).model_dump(mode="json")
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if key in LEFT_OUT:
            continue
        if isinstance(value, dict):
            usual = defaults.get(key, {})
            found |= {f"{key}.{k}": v for k, v in value.items() if k not in usual or usual[k] != v}
        elif value != defaults.get(key):
            found[key] = value
    found.pop("data.cache", None)
    if is_demo_encoder(str(found.get("model", ""))):
        del found["model"]
    methods = recipe.get("method") or []
    if methods:
        found["method"] = ",".join(method["name"] for method in methods)
    for method in methods:
        found |= method_keys(method)
    return found


def method_keys(method: dict[str, Any]) -> dict[str, Any]:
    """A method's parameters that are not the defaults, dotted."""
    name = method["name"]
    usual = METHODS[name].model_validate({"name": name}).model_dump() if name in METHODS else {}
    usual = json.loads(json.dumps(usual))
    return {
        f"method.{name}.{key}": value
        for key, value in method.items()
        if key != "name" and (key not in usual or usual[key] != value)
    }


def words_of(recipe: dict[str, Any]) -> list[str]:
    """The words of the command line that give this recipe, paths shortened."""
    words = []
    for key, value in differing(recipe).items():
        if isinstance(value, str):
            text = shown_path(value) if Path(value).is_absolute() else value
        else:
            text = json.dumps(value, separators=(",", ":"))
        words.append(f"{'data' if key == 'data.source' else key}={text}")
    return words


def command_of(recipe: dict[str, Any]) -> str:
    """The command that a run was started with, as far as it matters for the result."""
    verb = "compress" if recipe.get("method") or recipe.get("teacher") else "finetune"
    return shlex.join(["raybert", verb, *words_of(recipe)])


# -- groups ----------------------------------------------------------------------------------------


def read_all(folders: list[Path]) -> tuple[list[Run], dict[int, dict[str, str]]]:
    """The runs, each naming its encoder rather than its own teacher's folder, so that seeds with
    teachers of their own belong together; and the commands that made them, by each run's `id`."""
    runs: list[Run] = []
    commands: dict[int, dict[str, str]] = {}
    for folder in folders:
        run = read_run(folder)
        recipe = yaml.safe_load(run.recipe)
        taught_by = teacher_recipe(folder, recipe)
        encoder = encoder_of(recipe, taught_by, run.report.model)
        runs.append(replace(run, report=run.report.model_copy(update={"model": encoder})))
        made_by = commands[id(runs[-1])] = {"command": command_of(recipe)}
        if taught_by is not None:
            made_by["teacher_command"] = command_of(taught_by)
    return runs, commands


def spread(value: Spread | None) -> dict[str, Any] | None:
    """A mean with its sample standard deviation; counts stay exact."""
    if value is None:
        return None
    sd = None if value.sd is None else float(f"{value.sd:.4g}")
    return {"mean": float(f"{value.mean:.10g}"), "sd": sd, "n": value.n}


def costs(of: Callable[[Callable[[Measured], float]], Spread | None]) -> dict[str, Any]:
    """Score and costs of the students or of the teachers."""
    return {
        "score": spread(of(lambda m: m.score)),
        "parameters": spread(of(lambda m: m.parameters.total)),
        "parameters_without_embeddings": spread(of(lambda m: m.parameters.rest)),
        "bytes": spread(of(lambda m: m.bytes.weights)),
        "flops": spread(of(lambda m: m.flops or 0)),
    }


def speedups(group: Group) -> dict[str, Any]:
    """Speed-ups by backend and shape, as ``torch 1x128``."""
    places = {(r.backend, r.batch, r.length) for report in group.reports for r in report.speedup}

    def at(report: RunReport, place: tuple[str, int, int]) -> float | None:
        rows = (r for r in report.speedup if (r.backend, r.batch, r.length) == place)
        return next((r.speedup for r in rows), None)

    return {
        f"{place[0]} {place[1]}x{place[2]}": spread(group.spread(lambda r, p=place: at(r, p)))
        for place in sorted(places)
    }


def onnx_score(report: RunReport) -> float | None:
    """The main metric through ONNX Runtime."""
    metrics = report.onnx.metrics if report.onnx else None
    return metrics[report.metric] if metrics else None


def entry(group: Group, commands: dict[int, dict[str, str]]) -> dict[str, Any]:
    """What a group of seeds found out."""
    first, reports = group.first, group.reports
    machines = [report.hardware for report in reports]
    taught = first.teacher is not None
    return {
        "task": first.task,
        "metric": first.metric,
        "chain": first.chain,
        "label": group.label,
        "encoder": first.model,
        "simulated": group.simulated,
        "caveat": group.caveat,
        "n": len(reports),
        "seeds": sorted(report.seed for report in reports),
        "scores": [report.student.score for report in reports],
        "teacher": costs(group.teacher) if taught else None,
        "student": costs(lambda value: group.spread(lambda report: value(report.student))),
        "floor": first.floor,
        "retained": spread(group.spread(lambda report: report.retained)),
        "ratio": spread(group.spread(lambda report: report.ratio)),
        "speedup": speedups(group),
        "onnx_score": spread(group.spread(onnx_score)),
        "training_seconds": spread(group.spread(lambda report: report.training.seconds)),
        "training_steps": first.training.steps,
        **commands[id(group.runs[0])],
        "date": max(report.created for report in reports)[:10],
        "raybert": sorted({report.raybert for report in reports}),
        "hardware": [m for i, m in enumerate(machines) if m not in machines[:i]],
    }


# -- more seeds ------------------------------------------------------------------------------------

SEED = re.compile(r"train\.seed=\d+|-\d+(?=/model)")
"""Where a seed stands in a command: its own, and in the name of its teacher's folder."""

SPREADS = {"student", "teacher", "retained", "ratio", "speedup", "onnx_score", "training_seconds"}


def pooled(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    """Mean and sample deviation of the values of two spreads together; of one where one is
    missing. What is the same in both counts once, as a size does."""
    if one is None or other is None:
        return one or other
    same = one["mean"] == other["mean"] and not one["sd"] and not other["sd"]
    if same and 1 in (one["n"], other["n"]):
        return max(one, other, key=lambda value: value["n"])
    n = one["n"] + other["n"]
    mean = (one["n"] * one["mean"] + other["n"] * other["mean"]) / n
    squares = sum(
        (value["n"] - 1) * (value["sd"] or 0) ** 2 + value["n"] * (value["mean"] - mean) ** 2
        for value in (one, other)
    )
    return spread(Spread(mean, math.sqrt(squares / (n - 1)), n))


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two groups of the same command as one.

    Raises:
        SystemExit: a seed is in both.
    """
    if twice := set(old["seeds"]) & set(new["seeds"]):
        raise SystemExit(f"{old['task']}, {old['label']}: seed {min(twice)} is there already.")
    both = {**old, "n": old["n"] + new["n"]}
    for key in SPREADS:
        both[key] = _pooled_all(old[key], new[key])
    order = sorted(zip(old["seeds"] + new["seeds"], old["scores"] + new["scores"], strict=True))
    both |= {"seeds": [seed for seed, _ in order], "scores": [score for _, score in order]}
    both["date"] = max(old["date"], new["date"])
    for key in ("raybert", "hardware"):
        both[key] = old[key] + [value for value in new[key] if value not in old[key]]
    return both


def _pooled_all(old: Any, new: Any) -> Any:
    """Two spreads as one, or those of two mappings; a speed-up that one lacks is the other's."""
    if old is None or new is None or "mean" in old:
        return pooled(old, new)
    return {key: pooled(old.get(key), new.get(key)) for key in {**old, **new}}


def added(groups: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with more seeds, and groups that are new behind them."""

    def key(group: dict[str, Any]) -> tuple[str, ...]:
        commands = (group.get(part, "") for part in ("teacher_command", "command"))
        return group["encoder"], *(SEED.sub("", command) for command in commands)

    found = {key(group): group for group in groups}
    for group in more:
        old = found.get(key(group))
        found[key(group)] = joined(old, group) if old else group
    return list(found.values())


def main() -> None:
    """Read, group, print and write."""
    args = parse()
    file = RESULTS / f"{args.name}.json"
    runs, commands = read_all(args.runs)
    groups = [entry(group, commands) for group in group_runs(runs)]
    if args.told:
        groups = [{**group, "label": f"{group['label']} ({args.told})"} for group in groups]
    if args.add:
        groups = added(json.loads(file.read_text(encoding="utf-8"))["groups"], groups)
    named = "" if args.name == "quality" else f"--name {args.name} "
    found = {
        "name": args.name,
        "command": f"python tests/benchmarks/quality.py {named}RUN...",
        "date": today(),
        "groups": groups,
    }
    write_json(file, found)
    from tables import quality_table

    print(quality_table(groups))


if __name__ == "__main__":
    main()
