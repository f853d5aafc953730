"""What a run found out: ``report.json``'s schema, what was retained, and run folders read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from raybert import __version__
from raybert.config import Recipe
from raybert.errors import UserError
from raybert.latency import Backend
from raybert.yaml_file import read_yaml

RETAINED = (
    "Retained is (student - floor) / (teacher - floor), in the task's main metric. The floor is "
    "the score of always answering the most frequent class (for other tasks, of a model that has "
    "learned nothing). A plain ratio, student / teacher, is shown next to it: it flatters, since "
    "a student that has learned nothing already keeps floor / teacher of it. Where the teacher is "
    "not above the floor nothing can be retained, and n/a is shown."
)
"""How the headline number is defined; every report says so."""


class Part(BaseModel):
    """A frozen part of a report: unknown keys are refused, NaN survives JSON and back."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Parameters(Part):
    """Counts of ``raybert.bench.parameters``."""

    total: int
    embeddings: int
    rest: int


class Bytes(Part):
    """Sizes of ``raybert.bench.disk_bytes``; older reports do not tell embeddings apart."""

    weights: int
    embeddings: int | None = None
    total: int

    @property
    def rest(self) -> int | None:
        """Weights without embedding tables."""
        return None if self.embeddings is None else self.weights - self.embeddings


class Measured(Part):
    """One model: its metrics on the evaluation rows, the main one as ``score``, and its costs."""

    metrics: dict[str, float]
    score: float
    parameters: Parameters
    bytes: Bytes
    flops: int | None


class LatencyRow(Part):
    """A row of ``raybert.bench.latency``; ``model`` is ``student`` or ``teacher``."""

    model: str
    backend: Backend
    device: str
    batch: int
    length: int
    p50_ms: float
    p95_ms: float
    mean_ms: float
    throughput: float
    repeats: int
    threads: int
    peak_memory_mb: float


Place = tuple[Backend, int, int]
"""What models are timed at: backend, batch and length."""


class SpeedupRow(Part):
    """A row of ``raybert.bench.speedups``, against the teacher."""

    model: str
    backend: Backend
    batch: int
    length: int
    speedup: float


class Exported(Part):
    """The model as `raybert.export` wrote it; ``metrics`` are those of ONNX Runtime, ``hardware``
    what it was timed on, which older reports do not tell."""

    bytes: int
    int8: str | None
    difference: float
    metrics: dict[str, float] | None
    hardware: dict[str, Any] | None = None


class PhaseTime(Part):
    """One phase: optimiser steps and wall-clock seconds."""

    name: str
    steps: int
    seconds: float


class Training(Part):
    """The whole training: optimiser steps, wall-clock seconds, tokens seen."""

    steps: int
    seconds: float
    tokens: int
    phases: list[PhaseTime]


class RunReport(Part):
    """What ``report.json`` holds. Without methods, ``student`` is the fine-tuned teacher.

    FLOPs are of a row of ``length`` tokens, which older reports do not tell.
    """

    raybert: str
    name: str
    created: str
    task: str
    kind: str
    metric: str
    model: str
    methods: list[dict[str, Any]]
    seed: int
    workers: int
    teacher: Measured | None
    student: Measured
    length: int | None = None
    floor: float
    floors: dict[str, float]
    retained: float | None
    ratio: float | None
    latency: list[LatencyRow]
    speedup: list[SpeedupRow]
    simulated: bool
    simulated_methods: list[str] = []
    notes: list[str]
    facts: dict[str, dict[str, dict[str, float]]] = {}
    onnx: Exported | None = None
    training: Training
    hardware: dict[str, Any]

    @property
    def timed_integers(self) -> bool:
        """Whether the exported graph was timed, and multiplies in integers."""
        timed = any((row.model, row.backend) == ("student", "onnx") for row in self.latency)
        return timed and self.onnx is not None and self.onnx.int8 is not None

    @property
    def ranked_score(self) -> float:
        """What a front ranks it by: of what PyTorch only simulates, the score of the graph."""
        if self.simulated and self.onnx is not None and self.onnx.metrics:
            return self.onnx.metrics.get(self.metric, self.student.score)
        return self.student.score

    @property
    def elsewhere(self) -> dict[str, Any] | None:
        """The machine that ONNX Runtime was timed on, where it is another than ``hardware``."""
        if self.onnx is None or not any(row.backend == "onnx" for row in self.latency):
            return None
        return self.onnx.hardware if self.onnx.hardware != self.hardware else None

    def clock(self, model: str) -> dict[Place, float]:
        """Median milliseconds of ``student`` or ``teacher``, by what it was timed at."""
        return {
            (row.backend, row.batch, row.length): row.p50_ms
            for row in self.latency
            if row.model == model
        }

    @property
    def chain(self) -> str:
        """The methods' names in order, or that there were none."""
        return " + ".join(str(method["name"]) for method in self.methods) or (
            "distilled" if self.teacher else "fine-tuned teacher"
        )


def retained(student: float, teacher: float, floor: float) -> float | None:
    """The share of what the teacher had learned that the student still knows; see ``RETAINED``.

    Returns:
        1 for a student as good as its teacher, 0 for one at the floor, less below it; None when the
        teacher is not above the floor.
    """
    return (student - floor) / (teacher - floor) if teacher > floor else None


def caveat(reports: Sequence[RunReport]) -> str:
    """What of the compression is simulated in any of these runs: all of it, or a chain's methods;
    or nothing."""
    if any(report.simulated for report in reports):
        return "simulated"
    names = dict.fromkeys(name for report in reports for name in report.simulated_methods)
    return f"{' and '.join(names)} simulated" if names else ""


def latency_ms(report: RunReport, model: str = "student") -> float | None:
    """Median milliseconds at the smallest batch that was timed, in the fastest backend.

    Args:
        report: the run's.
        model: ``student`` or ``teacher``.

    Returns:
        Nothing where none was timed.
    """
    rows = [row for row in report.latency if row.model == model]
    least = min((row.batch for row in rows), default=0)
    return min((row.p50_ms for row in rows if row.batch == least), default=None)


def build(
    *,
    name: str,
    task: str,
    kind: str,
    metric: str,
    model: str,
    methods: Sequence[Mapping[str, Any]],
    seed: int,
    workers: int,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    floors: Mapping[str, float],
    training: Mapping[str, Any],
    hardware: Mapping[str, Any],
    length: int | None = None,
    latency: Sequence[Mapping[str, Any]] = (),
    speedup: Sequence[Mapping[str, Any]] = (),
    simulated: Sequence[str] = (),
    notes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> RunReport:
    """Assemble and validate a run's report, working out scores, ratio and retained share.

    Args:
        metric: the main metric, a key of both models' ``metrics`` and of ``floors``.
        methods: the resolved parameters of each method, with its ``name``; none for a fine-tuned
            teacher.
        student, teacher: ``metrics``, ``parameters``, ``bytes`` and ``flops`` of each.
        floors: each metric's score of a model that has learned nothing.
        length: tokens of the row that both models' FLOPs are of.
        latency, speedup: rows of ``raybert.bench``, whose models are called ``student`` and
            ``teacher``.
        simulated: names of methods that save no time in PyTorch here; labelled so wherever the run
            is shown. Where all are, the run's compression is simulated.
        facts: what phases told of their start: phase -> title -> name -> number.

    Raises:
        UserError: the main metric is missing, or a value has not the type that ``RunReport`` says.
    """
    data = {
        "raybert": __version__,
        "name": name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "task": task,
        "kind": kind,
        "metric": metric,
        "model": model,
        "methods": [dict(method) for method in methods],
        "seed": seed,
        "workers": workers,
        **_scored(metric, student, teacher, floors),
        "length": length,
        "latency": [dict(row) for row in latency],
        "speedup": [dict(row) for row in speedup],
        "simulated": bool(methods) and all(method["name"] in simulated for method in methods),
        "simulated_methods": list(simulated),
        "notes": list(notes),
        "facts": dict(facts or {}),
        "training": dict(training),
        "hardware": dict(hardware),
    }
    return validated(data, f"the report of {name}")


def _scored(
    metric: str,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    floors: Mapping[str, float],
) -> dict[str, Any]:
    """The models with their scores, and how these compare; see `build`."""
    for owner, metrics in (
        ("the student", student["metrics"]),
        ("the teacher", teacher["metrics"] if teacher else {metric: 0.0}),
        ("the floors", floors),
    ):
        if metric not in metrics:
            raise UserError(
                f"{owner} lack the main metric {metric!r}; found: {', '.join(metrics)}."
            )
    score = float(student["metrics"][metric])
    goal = float(teacher["metrics"][metric]) if teacher else None
    floor = float(floors[metric])
    return {
        "student": {**student, "score": score},
        "teacher": {**teacher, "score": goal} if teacher else None,
        "floor": floor,
        "floors": dict(floors),
        "retained": None if goal is None else retained(score, goal, floor),
        "ratio": score / goal if goal else None,
    }


APART = 1.0
"""Points of 100 between the scores of a model and of its graph, from which on it is noted."""


_APART = "ONNX Runtime scores"


def with_export(report: RunReport, found: Mapping[str, Any]) -> RunReport:
    """A run's report with what an ``export.json`` says: size, metrics and latency in ONNX Runtime;
    and a note where they score differently.

    Args:
        report: the run's report; rows of an earlier export are replaced.
        found: the export's report, whose latency rows call the exported model ``model``.
    """
    names = {"model": "student"}
    rows = {
        key: [
            *(row.model_dump() for row in getattr(report, key) if row.backend != "onnx"),
            *({**row, "model": names.get(row["model"], row["model"])} for row in found[key]),
        ]
        for key in ("latency", "speedup")
    }
    exported = {
        "bytes": found["bytes"],
        "int8": found["int8"],
        "difference": found["parity"]["largest_difference"],
        "metrics": found["metrics"]["onnx"] if found["metrics"] else None,
        "hardware": found["hardware"],
    }
    notes = [note for note in report.notes if not note.startswith(_APART)]
    scored = exported["metrics"][report.metric] if exported["metrics"] else report.student.score
    if 100 * abs(scored - report.student.score) > APART:
        notes.append(
            f"{_APART} {report.metric} {scored:.3f} on the dev rows, and PyTorch "
            f"{report.student.score:.3f}: the graph's integers are not the model's on "
            "this processor"
        )
    data = {**report.model_dump(), **rows, "notes": notes, "onnx": exported}
    return validated(data, f"the report of {report.name}")


def validated(data: Any, origin: str) -> RunReport:
    """``data`` as a report; ``UserError`` names ``origin`` and the values that do not fit."""
    try:
        return RunReport.model_validate(data)
    except ValidationError as error:
        wrong = "; ".join(
            f"`{'.'.join(str(part) for part in item['loc'])}` {item['msg'].lower()}"
            for item in error.errors(include_url=False)[:5]
        )
        raise UserError(
            f"{origin} does not read as a report of raybert {__version__}: {wrong}."
        ) from None


@dataclass(frozen=True)
class Run:
    """A run folder read back: its report, the recipe's YAML, and the lines of ``metrics.jsonl``."""

    report: RunReport
    recipe: str
    metrics: tuple[dict[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """What runs that differ only by seed have in common."""
        report = self.report
        methods = [{k: v for k, v in m.items() if k != "seed"} for m in report.methods]
        # Two teachers of one encoder may still be of two sizes.
        taught = report.teacher.parameters.model_dump() if report.teacher else None
        shared = [report.task, report.model, methods, _without_seed(self.recipe), taught]
        return json.dumps(shared, sort_keys=True, default=str)


def _without_seed(recipe: str) -> Any:
    """The recipe without seeds and what differs with them: name, folder, the teacher's folder."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): strip(v) for k, v in value.items() if k != "seed"}
        return [strip(v) for v in value] if isinstance(value, list) else value

    data = yaml.safe_load(recipe)
    if not isinstance(data, dict):
        return data
    for key, field in Recipe.model_fields.items():
        # One that an earlier version wrote lacks keys that have come since.
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            data[key] = {**field.annotation().model_dump(mode="json"), **(data.get(key) or {})}
    elsewhere = {"name", "out", "teacher", "resources"}
    return strip({k: v for k, v in data.items() if k not in elsewhere})


def read_run(folder: Path, mend: str | None = None) -> Run:
    """Read a finished run folder.

    Args:
        folder: of the run.
        mend: what to say of a report that is not there or damaged; nothing: what helps a run.

    Raises:
        UserError: it is no run folder, the run has not finished, or a file in it is damaged.
    """
    folder = Path(folder)
    recipe, report = folder / "recipe.yaml", folder / "report.json"
    if not recipe.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no recipe.yaml. Give folders under runs/."
        )
    if not report.is_file():
        raise UserError(
            f"{folder} has no report.json"
            + (
                f". {mend}"
                if mend
                else ": its run has not finished. Start the same command again to resume it."
            )
        )
    read_yaml(recipe)  # what its text says is looked at later
    try:
        found = validated(_json(report), str(report))
    except UserError as error:
        raise UserError(
            f"{error} "
            + (mend or "Remove it and start the run's command again, which writes it anew.")
        ) from None
    return Run(
        found,
        recipe.read_text(encoding="utf-8"),
        tuple(read_metrics(folder / "metrics.jsonl")),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Several run folders, in order; one given twice counts once.

    Raises:
        UserError: none was given, or as ``read_run``.
    """
    unique = {Path(folder).resolve(): Path(folder) for folder in folders}
    if not unique:
        raise UserError("no run to report on; give run folders, for example runs/*.")
    return [read_run(folder) for folder in unique.values()]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a dying process cut short is left out.

    Raises:
        UserError: a line before the last is not JSON, or not such as a run writes.
    """
    if not file.is_file():
        return []
    lines = [line for line in file.read_bytes().split(b"\n") if line]
    found = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{file}, line {number} is not JSON; remove that line.") from None
            continue
        if not _is_event(line):
            raise UserError(f"{file}, line {number} is not of a run's log; remove that line.")
        found.append(line)
    return found


def _is_event(line: Any) -> bool:
    """Whether a log's line has what the curves are drawn of."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return False
    numbers = [v for k, v in line.items() if k not in ("kind", "phase") and v is not None]
    return line["kind"] not in ("train", "eval") or (
        isinstance(line.get("phase"), str)
        and all(type(line.get(key)) is int for key in ("phase_index", "step", "total"))
        and all(isinstance(v, float) or (type(v) is int and abs(v) < 2**63) for v in numbers)
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}).") from None
