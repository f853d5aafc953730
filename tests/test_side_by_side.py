"""Runs of one teacher are timed together: who is timed with whom, and what their reports say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import raybert.export as export_module
from raybert import side_by_side
from raybert.compare import compare, make_comparison
from raybert.errors import UserError
from raybert.recipe_file import recipe_from
from raybert.results import read_run
from raybert.side_by_side import Student


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the clock: the n-th model of the k-th call takes (11 + k) / n milliseconds a
    row. Calls that only try whether a model can be timed do not count."""
    calls = []

    def latency(models, shapes, *, backend, seconds=0.0, repeats=None):
        if repeats is None:
            calls.append((backend, [Path(path).parent.name for path in models.values()], shapes))
        shared = {"backend": backend, "device": "cpu", "threads": 1, "peak_memory_mb": 1.0}
        own = 11.0 + len(calls)
        return [
            {
                **{"model": name, "batch": batch, "length": length, **shared},
                **{"p50_ms": own * batch / n, "p95_ms": 12.0, "mean_ms": 12.0},
                **{"throughput": n / 0.012, "repeats": 1},
            }
            for batch, length in shapes
            for n, name in enumerate(models, start=1)
        ]

    monkeypatch.setattr(side_by_side, "latency", latency)
    return calls


def test_a_comparison_times_each_backend_once(toy, tmp_path, clock):
    recipe = toy(
        tmp_path / "out",
        finetune={"max_steps": 2},
        train={"max_steps": 1},
        measure={"batches": [1, 2], "length": 16},
        export="onnx",
    )
    comparison = make_comparison(recipe, ["theseus", "q8bert"])
    compare(comparison, tell=print)
    shapes = [(1, 16), (2, 16)]
    torch, onnx = clock
    assert torch == ("torch", ["teacher", "theseus", "q8bert"], shapes)
    assert (onnx[0], onnx[1][1:], onnx[2]) == ("onnx", ["theseus", "q8bert"], shapes)
    for speedup, name in ((2.0, "theseus"), (3.0, "q8bert")):
        report = read_run(tmp_path / "out" / name).report
        took = {"torch": 12.0, "onnx": 13.0}
        places = [(b, x) for b in took for x in (1, 2)]
        found = {(r.backend, r.batch, r.model): r.p50_ms for r in report.latency}
        assert found == {
            **{(b, x, "teacher"): took[b] * x for b, x in places},
            **{(b, x, "student"): took[b] * x / speedup for b, x in places},
        }
        assert [(r.backend, r.batch, r.speedup) for r in report.speedup] == [
            (*place, speedup) for place in places
        ]
        told = json.loads((tmp_path / "out" / name / "onnx" / "export.json").read_text())
        assert {row["model"] for row in told["latency"]} == {"teacher", "model"}
        page = (tmp_path / "out" / name / "onnx" / "README.md").read_text()
        assert f"{speedup:.2f}x" in page
        card = (tmp_path / "out" / name / "model" / "README.md").read_text(encoding="utf-8")
        assert card.count(f"{speedup:.2f}×") == len(places), "the card says what the report does"
        assert "Latency is a median" in card
    assert "2.00×" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    compare(comparison, tell=print)
    assert len(clock) == 2, "what was timed is not timed again"


def test_failing_exports_end_no_comparison_and_are_made_up_for_in_turns(
    toy, teacher, tmp_path, clock, monkeypatch
):
    measure = {"batches": [1], "length": 16}
    keys = {"teacher": str(teacher), "train": {"max_steps": 1}, "measure": measure}
    comparison = make_comparison(toy(tmp_path / "out", **keys, export="onnx"), ["theseus", "ebert"])

    def refused(int8):
        raise UserError("the graph is wrong.")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "need_packages", refused)
        said = "^all is trained, and the report written; not measured: theseus: the.*; ebert: the"
        with pytest.raises(UserError, match=said):
            compare(comparison, tell=print)
    assert (tmp_path / "out" / "report.html").is_file()

    compare(comparison, tell=print)
    timed = [(backend, names[1:]) for backend, names, _ in clock]
    assert timed == [(backend, ["theseus", "ebert"]) for backend in ("torch", "onnx")]
    for name in ("theseus", "ebert"):
        report = read_run(tmp_path / "out" / name).report
        assert report.onnx is not None
        assert {row.backend for row in report.latency} == {"torch", "onnx"}


def test_a_model_that_cannot_be_timed_has_no_other_timed_again(
    toy, teacher, tmp_path, clock, monkeypatch
):
    measure = {"batches": [1], "length": 16}
    keys = {"teacher": str(teacher), "train": {"max_steps": 1}, "measure": measure}
    recipe = toy(tmp_path / "out", **keys, export="onnx")
    names = ["theseus", "ebert", "lobert"]
    comparison, works = make_comparison(recipe, names), side_by_side.latency

    def fails(models, shapes, *, backend, **how):
        if backend == "onnx" and any(Path(path).parent.name == "ebert" for path in models.values()):
            raise UserError("the process timing it ended.")
        return works(models, shapes, backend=backend, **how)

    def compared() -> list[tuple[str, list[str]]]:
        count = len(clock)
        with pytest.raises(UserError, match="not measured: ebert: the process timing it ended"):
            compare(comparison, tell=print)
        return [(backend, timed[1:]) for backend, timed, _ in clock[count:]]

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "latency", fails)
        others = [["theseus"], ["lobert"], ["theseus", "lobert"]]
        assert compared() == [("torch", names), *(("onnx", timed) for timed in others)]
        assert compared() == []
    count = len(clock)
    compare(comparison, tell=print)
    assert [(backend, timed[1:]) for backend, timed, _ in clock[count:]] == [("onnx", names)]


def test_what_is_compared_was_timed_at_one_shape_and_in_turns(toy, teacher, tmp_path, clock):
    def compared(chains, **measure):
        matrix = {"name": "ma_bert", "length": 12, "warm_start": False}
        keys = {"teacher": str(teacher), "method": [matrix]}
        keys |= {"train": {"max_steps": 1}, "data": {"max_length": 12}}
        recipe = toy(tmp_path / "out", **keys, measure={"batches": [1], "length": 16, **measure})
        count = len(clock)
        compare(make_comparison(recipe, [*chains, "ma_bert"]), tell=print)
        return [(names[1:], shapes) for _, names, shapes in clock[count:]]

    names = ["theseus", "ma_bert"]
    assert compared(["theseus"]) == [(names, [(1, 12)])], "MA-BERT reads no more"
    lines = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").splitlines()
    for name, length in (("theseus", 16), ("ma_bert", 12)):
        (row,) = [line for line in lines if line.startswith(f"| {name}; seed")]
        assert re.search(rf"fewer than [^;|]+; {length} tokens\)", row), "FLOPs, and of how many"
    # One that comes later, another batch and a run that was timed by itself: all run again.
    names.insert(1, "q8bert")
    assert compared(["theseus", "q8bert"]) == [(names, [(1, 12)])]
    shapes = [(2, 12), (1, 12)]
    assert compared(["theseus", "q8bert"], batches=[2, 1]) == [(names, shapes)]
    place = tmp_path / "out" / "theseus" / "report.json"
    report = json.loads(place.read_text())
    for row in report["latency"]:
        row["p50_ms"] *= 3
    place.write_text(json.dumps(report))
    assert compared(["theseus", "q8bert"], batches=[2, 1]) == [(names, shapes)]
    reports = [read_run(tmp_path / "out" / name).report for name in names]
    assert {len(report.latency) for report in reports} == {4}, "old times make room for new ones"
    assert len({str(report.clock("teacher")) for report in reports}) == 1
    assert compared(["theseus", "q8bert"], batches=[2, 1]) == [], "all is as it should be"


def test_models_that_do_not_fit_together_take_turns_in_groups(monkeypatch):
    monkeypatch.setattr(side_by_side, "own_memory", lambda: (2 * 3.5, 100.0))
    monkeypatch.setattr(side_by_side, "_memory", lambda model: 1.0)
    a, b = Path("a"), Path("b")
    students = [Student(Path(str(n)), a, 128) for n in range(5)]
    other = Student(Path("other"), b, 128)
    groups = list(side_by_side._groups([*students, other]))
    assert groups == [students[:2], students[2:4], students[4:], [other]]


def test_one_that_fits_nowhere_is_timed_all_the_same(monkeypatch):
    monkeypatch.setattr(side_by_side, "own_memory", lambda: (1.0, 100.0))
    monkeypatch.setattr(side_by_side, "_memory", lambda model: 1.0)
    students = [Student(Path(str(n)), Path("a"), 128) for n in range(2)]
    assert list(side_by_side._groups(students)) == [students[:1], students[1:]]


def test_one_model_that_cannot_be_timed_leaves_the_others_theirs(tmp_path, monkeypatch):
    students = [Student(tmp_path / name, tmp_path / "teacher", 16) for name in ("a", "b", "c")]
    recipe = recipe_from({"teacher": "t", "measure": {"batches": [1]}})
    timed: list[list[str]] = []

    def time(group, measured):
        if any(student.folder.name == "b" for student in group):
            raise UserError("b: the process timing it ended.")
        timed.append([student.folder.name for student in group])

    monkeypatch.setattr(side_by_side, "_time_torch", time)
    monkeypatch.setattr(side_by_side, "_student", lambda folder: students.pop(0))
    monkeypatch.setattr(side_by_side, "_behind", lambda group, backend, measured: list(group))
    monkeypatch.setattr(Student, "report", property(lambda self: SimpleNamespace(onnx=None)))
    monkeypatch.setattr(side_by_side, "_memory", lambda model: 1)
    failed = side_by_side.measure([tmp_path] * 3, recipe, print)
    assert failed == {tmp_path / "b": "b: the process timing it ended."}
    assert timed == [["a"], ["c"], ["a", "c"]], "each by itself, and those that can be in turns"


def test_one_model_that_cannot_be_exported_leaves_the_others_theirs(tmp_path, monkeypatch):
    students = [Student(tmp_path / name, tmp_path / "teacher", 16) for name in ("a", "b")]
    recipe = recipe_from({"teacher": "t", "measure": {"batches": []}, "export": "onnx"})
    exported: list[str] = []

    def export(student, recipe, tell):
        if student.folder.name == "a":
            raise UserError("the graph does not compute what the model does.")
        exported.append(student.folder.name)

    monkeypatch.setattr(side_by_side, "_export", export)
    monkeypatch.setattr(side_by_side, "_student", lambda folder: students.pop(0))
    monkeypatch.setattr(Student, "report", property(lambda self: SimpleNamespace(onnx=None)))
    failed = side_by_side.measure([tmp_path] * 2, recipe, print)
    assert list(failed) == [tmp_path / "a"]
    assert exported == ["b"]
