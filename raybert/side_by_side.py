"""Finished runs of one teacher, timed together: all students in turns with it.

Timed run by run, each student would meet another mood of the machine, and the teacher would be
loaded and timed again for each. Here every model of a backend is alive in a process of its own and
they run in turns, so that a comparison's speed-ups are comparable with each other.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from raybert.artifact import add_export, publish
from raybert.bench import disk_bytes, hardware
from raybert.compressed import longest_input
from raybert.config import MeasureConfig, Recipe
from raybert.errors import UserError
from raybert.export import add_latency, export, export_graph
from raybert.latency import Backend, latency, speedups
from raybert.machine import own_memory
from raybert.models import brought_here, read_config
from raybert.recipe_file import load_recipe
from raybert.results import Place, RunReport, read_run, validated
from raybert.shares import LIBRARIES

TEACHER = "teacher"


@dataclass(frozen=True)
class Student:
    """A finished run that is to be timed beside its teacher.

    Attributes:
        folder: the run folder.
        teacher: the teacher's model folder.
        length: tokens a row that both can read, or less: what it is timed at.
    """

    folder: Path
    teacher: Path
    length: int

    @property
    def name(self) -> str:
        """What the run is called among the models that are timed together."""
        return str(self.folder)

    @property
    def report(self) -> RunReport:
        """As it is on storage now."""
        return read_run(self.folder).report


def measure(
    folders: Sequence[Path], recipe: Recipe, tell: Callable[[str], None]
) -> dict[Path, str]:
    """Export what was not yet, and time runs in turns, as a recipe says; their reports are written
    anew.

    All are timed with rows of one length, the longest that every model reads. Where one of them
    lacks a shape, or they were not timed in turns with each other, all are timed again: times of
    several sessions are of several moods of the machine, or of several machines. Those that keep
    the others waiting are tried first, so that one that can never be timed does not have all timed
    anew each time.

    Args:
        folders: run folders that are to be compared; those without a teacher are left alone.
        recipe: its ``measure`` and ``export`` count.
        tell: gets one line for each thing that happens.

    Returns:
        The folders of models that cannot be exported or timed, and why; the others are measured
        all the same.

    Raises:
        UserError: a folder is no finished run.
    """
    found = [student for folder in folders if (student := _student(folder))]
    length = min([recipe.measure.length, *(student.length for student in found)])
    students = [replace(student, length=length) for student in found]
    failed: dict[Path, str] = {}
    if recipe.export:
        for student in students:
            if student.report.onnx is None:
                try:
                    _export(student, recipe, tell)
                except UserError as error:
                    failed[student.folder] = str(error)
    backends: tuple[tuple[Backend, Time], ...] = ("torch", _time_torch), ("onnx", _time_onnx)
    for backend, time in backends if recipe.measure.batches else ():
        able = [s for s in students if backend == "torch" or s.report.onnx is not None]
        behind = [s for group in _groups(able) for s in _behind(group, backend, recipe.measure)]
        faults = _faults(behind, backend, recipe.measure) if len(behind) < len(able) else {}
        failed = {**faults, **failed}
        if len(faults) == len(behind):
            continue
        for group in _groups([s for s in able if s.folder not in faults]):
            names = ", ".join(student.folder.name for student in group)
            tell(f"timing in turns, {backend}, rows of {length} tokens: the teacher, {names}")
            failed = {**_try(time, group, recipe.measure), **failed}
    for folder, reason in failed.items():
        tell(f"{folder.name} could not be measured: {reason}")
    return failed


def _export(student: Student, recipe: Recipe, tell: Callable[[str], None]) -> None:
    own = load_recipe(str(student.folder / "recipe.yaml"))
    own = own.model_copy(update={"measure": recipe.measure})
    export(student.folder, own, time=False, overwrite=True, tell=tell)
    add_export(student.folder)


Time = Callable[[Sequence[Student], MeasureConfig], None]
"""Times a group in turns, and writes what came out to its reports."""


def _try(time: Time, group: Sequence[Student], measured: MeasureConfig) -> dict[Path, str]:
    """Time a group, or, where one of it cannot be timed, the others; the folders of those that
    cannot, and why."""
    try:
        time(group, measured)
    except UserError as error:
        if len(group) == 1:
            return {group[0].folder: str(error)}
        each = [_try(time, [student], measured) for student in group]
        failed = {folder: reason for found in each for folder, reason in found.items()}
        able = [student for student in group if student.folder not in failed]
        if failed and len(able) > 1:
            failed |= _try(time, able, measured)
        return failed
    return {}


def _student(folder: Path) -> Student | None:
    own = load_recipe(str(folder / "recipe.yaml"))
    if own.teacher is None and not own.method:
        return None
    teacher = brought_here(own.teacher or folder / "teacher")
    configs = [read_config(str(path)) for path in (folder / "model", teacher)]
    return Student(folder, teacher, min(map(longest_input, configs)))


def _behind(group: Sequence[Student], backend: Backend, measured: MeasureConfig) -> list[Student]:
    """Those of a group that were not timed at every shape in turns with most of it: sessions are
    told apart by the times of the teacher, which are those of no other session."""
    places: list[Place] = [(backend, batch, group[0].length) for batch in measured.batches]
    sessions: dict[Student, tuple[float, ...]] = {}
    for student in group:
        report = student.report
        own, taught = report.clock("student"), report.clock(TEACHER)
        if all(place in own and place in taught for place in places):
            sessions[student] = tuple(taught[place] for place in places)
    if not sessions:
        return list(group)
    ((most, _),) = Counter(sessions.values()).most_common(1)
    return [student for student in group if sessions.get(student) != most]


def _faults(
    students: Sequence[Student], backend: Backend, measured: MeasureConfig
) -> dict[Path, str]:
    """The folders of models that no pass at each shape can be timed of, and why, up to the first
    that can be timed."""
    found: dict[Path, str] = {}
    for student in students:
        model = student.folder / ("model" if backend == "torch" else "onnx")
        shapes = [(batch, student.length) for batch in measured.batches]
        try:
            latency({student.name: model}, shapes, backend=backend, repeats=1)
        except UserError as error:
            found[student.folder] = str(error)
        else:
            break
    return found


def _groups(students: Sequence[Student]) -> Iterator[list[Student]]:
    """Students of one teacher, as many as fit beside it into half the free memory."""

    def key(student: Student) -> Path:
        return student.teacher

    for teacher, alike in groupby(sorted(students, key=key), key):
        group: list[Student] = []
        free = 0.0
        for student in alike:
            needed = _memory(student.folder / "model")
            if group and free < needed:
                yield group
                group = []
            if not group:
                free = own_memory()[0] / 2 - _memory(teacher)
            free -= needed
            group.append(student)
        yield group


def _memory(model: Path) -> float:
    """Bytes that a process with a model takes, about: its file's, and as many while it loads."""
    return LIBRARIES + 2 * disk_bytes(model)["weights"]


def _time_torch(students: Sequence[Student], measured: MeasureConfig) -> None:
    models = {student.name: student.folder / "model" for student in students}
    found = _timed({TEACHER: students[0].teacher, **models}, students[0].length, measured, "torch")
    for student in students:
        report = student.report
        data, own = report.model_dump(), _own(found, student, "student")
        rows = {
            key: [*own[key], *(row for row in data[key] if row["backend"] != "torch")]
            for key in own
        }
        data = {**data, **rows, "hardware": hardware()}
        publish(student.folder, validated(data, f"the report of {report.name}"))


def _time_onnx(students: Sequence[Student], measured: MeasureConfig) -> None:
    models = {student.name: student.folder / "onnx" for student in students}
    with tempfile.TemporaryDirectory(prefix="raybert-teacher-") as passing:
        teacher = export_graph(students[0].teacher, Path(passing))
        found = _timed({TEACHER: teacher, **models}, students[0].length, measured, "onnx")
    for student in students:
        add_latency(student.folder / "onnx", _own(found, student, "model"))
        add_export(student.folder)


def _timed(
    models: Mapping[str, Path], length: int, measured: MeasureConfig, backend: Backend
) -> dict[str, list[dict[str, Any]]]:
    shapes = [(batch, length) for batch in measured.batches]
    rows = latency(models, shapes, backend=backend, seconds=measured.seconds)
    return {"latency": rows, "speedup": speedups(rows, TEACHER)}


def _own(
    found: Mapping[str, list[dict[str, Any]]], student: Student, called: str
) -> dict[str, list[dict[str, Any]]]:
    """A student's rows and its teacher's, the student by the name that its report calls it."""
    names = {student.name: called, TEACHER: TEACHER}
    return {
        key: [{**row, "model": names[row["model"]]} for row in rows if row["model"] in names]
        for key, rows in found.items()
    }
