"""One teacher, several chains: what is refused, what is run, and what is told."""

from __future__ import annotations

import json

import pytest

from raybert.cli import main
from raybert.compare import compare, make_comparison
from raybert.errors import UserError
from raybert.methods import METHODS


def test_chains_take_their_parameters_from_the_recipe(toy, tmp_path):
    lobert = {"name": "lobert", "share": 0.7}
    recipe = toy(tmp_path / "out", method=["theseus", lobert])
    found = make_comparison(recipe, ["lobert", "theseus, lobert"], [1, 2])
    names = [student.folder.name for student in found.students]
    wanted = ["lobert-seed1", "lobert-seed2", "theseus-lobert-seed1", "theseus-lobert-seed2"]
    assert names == wanted
    assert [s.train.seed for s in found.students] == [1, 2, 1, 2]
    assert all(student.method[-1].model_dump()["share"] == 0.7 for student in found.students)
    assert found.teacher is not None
    assert found.teacher.folder == tmp_path / "out" / "teacher"
    assert {s.teacher for s in found.students} == {found.teacher.out}
    assert {s.model for s in found.students} == {None}


def test_a_seed_counts_once(toy, tmp_path):
    found = make_comparison(toy(tmp_path, teacher=str(tmp_path)), ["theseus"], [2, 1, 2])
    assert [student.train.seed for student in found.students] == [2, 1]


def test_without_chains_every_method_stands_alone(toy, tmp_path):
    alone = make_comparison(toy(tmp_path, teacher=str(tmp_path)))
    assert [s.folder.name for s in alone.students] == list(METHODS)
    assert alone.teacher is None
    own = make_comparison(toy(tmp_path, method=["theseus", "q8bert"]))
    assert [s.folder.name for s in own.students] == ["theseus", "q8bert", "theseus-q8bert"]


@pytest.mark.parametrize(
    ("methods", "chains", "message"),
    [
        ([], ["theseus", "thesius"], "did you mean 'theseus'|known: theseus"),
        ([], ["theseus", "theseus"], "twice"),
        (["lobert"], ["theseus"], "parameters for lobert, and no chain uses it"),
    ],
)
def test_chains_that_make_no_sense_are_refused(toy, tmp_path, methods, chains, message):
    with pytest.raises(UserError, match=message):
        make_comparison(toy(tmp_path / "out", method=methods), chains)


def test_an_illegal_chain_is_refused_before_the_teacher_is_trained(toy, tmp_path):
    recipe = toy(tmp_path / "out")
    comparison = make_comparison(recipe, ["theseus", "q8bert,theseus"])
    with pytest.raises(UserError, match=r"^q8bert-theseus: .*q8bert"):
        _ = comparison.plans()
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(toy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds something that is no run, notes\.txt"):
        compare(make_comparison(toy(tmp_path), ["theseus"]), tell=print)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_holds_another_run_is_refused_before_anything_is_trained(
    toy, teacher, tmp_path
):
    keys = {"train": {"max_steps": 1}, "finetune": {"max_steps": 1}}
    for shared in ({}, {"teacher": str(teacher)}):
        out = tmp_path / ("given" if shared else "made")
        compare(make_comparison(toy(out, **keys, **shared), ["theseus"]), tell=print)
        compare(make_comparison(toy(out, **keys, **shared), ["theseus"]), tell=print)
        before = sorted(out.rglob("*"))
        other = toy(out, **keys, **shared, method=[{"name": "theseus", "replacing_rate": 0.7}])
        for chains in (["theseus"], ["q8bert", "theseus"]):
            refused = make_comparison(other, chains)
            with pytest.raises(UserError, match=r"^theseus: .* holds another run: method"):
                _ = refused.plans()
            with pytest.raises(UserError, match=r"^theseus: .* holds another run: method"):
                compare(refused, tell=print)
        if not shared:
            changed = toy(out, **{**keys, "finetune": {"max_steps": 2}})
            with pytest.raises(UserError, match="teacher holds another run: finetune"):
                compare(make_comparison(changed, ["q8bert"]), tell=print)
        assert sorted(out.rglob("*")) == before


def test_seeds_that_come_later_leave_the_first_its_run(toy, teacher, tmp_path):
    recipe = toy(tmp_path, teacher=str(teacher), train={"max_steps": 1})

    def compared(seeds):
        comparison = make_comparison(recipe, ["theseus"], seeds)
        compare(comparison, tell=print)
        made = {path.parent.parent.name for path in tmp_path.rglob("model/config.json")}
        return [student.folder.name for student in comparison.students], made

    assert compared([1]) == (["theseus"], {"theseus"})
    names = ["theseus", "theseus-seed2"]
    assert compared([1, 2]) == (names, set(names))
    assert compared([2]) == (names[1:], set(names))
    assert compared([2, 1])[1] == set(names)
    assert "n = 2 seeds" in (tmp_path / "report.md").read_text()


def test_all_chains_are_run_beside_their_teacher(toy, tmp_path):
    out, told = tmp_path / "out", []
    recipe = toy(out, finetune={"max_steps": 4}, train={"max_steps": 2})
    comparison = make_comparison(recipe, ["theseus", "q8bert"])
    assert len(comparison.plans()) == 2
    page = compare(comparison, tell=told.append)
    assert page == out / "report.html"
    for name in ("teacher", "theseus", "q8bert"):
        assert (out / name / "model" / "model.safetensors").is_file()
        assert page.read_text(encoding="utf-8").count(name)
    scores = {
        name: json.loads((out / name / "report.json").read_text())["teacher"]["score"]
        for name in ("theseus", "q8bert")
    }
    assert len(set(scores.values())) == 1, "one teacher"
    table = next(text for text in told if "pareto" in text)
    assert [line.split()[1] for line in table.splitlines()[2:]] == [
        "fine-tuned",
        "theseus",
        "q8bert",
    ]

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    compare(make_comparison(recipe, ["theseus", "q8bert"]), tell=told.append)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "nothing is run again"


def test_command_line_predicts_every_chain(rows, encoder, tmp_path, capsys):
    words = [f"data.{key}={value}" for key, value in rows.items()]
    words += ["task=classification", f"model={encoder}", f"out={tmp_path / 'out'}"]
    chains = ["--chain", "theseus", "--chain", "theseus,q8bert", "--dry-run"]
    assert main(["compare", *chains, *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count("phases") == 2
    assert not (tmp_path / "out").exists()
    assert main(["compare", "--chain", "q8bert,theseus", "--dry-run", *words]) == 2
    assert "q8bert" in capsys.readouterr().err


def test_seeds_begin_at_0(rows, encoder, tmp_path, capsys):
    words = [f"data.{key}={value}" for key, value in rows.items()]
    words += ["task=classification", f"model={encoder}", f"out={tmp_path / 'out'}"]
    words += ["--chain", "theseus", "--dry-run"]
    assert main(["compare", *words, "--seeds", "0,1"]) == 0
    assert capsys.readouterr().out.count("phases") == 2
    assert main(["compare", *words, "--seeds", "-1"]) == 2
    assert "'-1' is not a list of whole numbers from 0 on" in capsys.readouterr().err
