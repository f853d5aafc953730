"""One trial without Ray: what it is allowed, what it reports, what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raybert import machine, trial
from raybert.errors import TransientError, UserError
from raybert.objectives import parse_objectives
from raybert.plan import make_plan, resolve_paths
from raybert.predictions import Predictions
from raybert.recipe_file import dump_recipe, load_recipe
from raybert.search_plan import plan_of
from raybert.trial import ORIGIN, Work, _Carrier, _take_over, _TuneHooks, run_trial


@pytest.fixture
def told(monkeypatch) -> list[dict[str, Any]]:
    """What a trial tells Tune, which is not there; it is trial 0 of a population of two."""
    reports: list[dict[str, Any]] = []
    fake = SimpleNamespace(
        get_context=lambda: SimpleNamespace(get_trial_id=lambda: "abc_00000"),
        get_checkpoint=lambda: None,
        report=reports.append,
    )
    monkeypatch.setattr(trial, "tune", fake)
    monkeypatch.setattr(trial.logging, "disable", lambda level: None)
    return reports


def work_of(recipe: Any, folder: Path, **keys: Any) -> Work:
    shared: dict[str, Any] = {
        "objectives": parse_objectives("score,bytes", ("accuracy",)),
        "cpus": 1,
        "gpu": 0.0,
        "hands_over": False,
        "keys": ("train.lr",),
        "teacher_metrics": {"accuracy": 0.9},
        "address": None,
        "data": "none",
    }
    return Work(recipe, folder, **{**shared, **keys})


CONFIG: dict[str, Any] = {"number": 0, "seed": None, "population": None}
CONFIG["values"] = {"train.lr": 1e-3}


def test_a_trial_that_does_not_see_the_search_says_so_and_trains_nothing(toy, tmp_path, told):
    recipe = toy(tmp_path / "r", teacher="t", method=["lobert"])
    run_trial(CONFIG, work_of(recipe, tmp_path / "nowhere"))
    (report,) = told
    assert f"{tmp_path / 'nowhere'} cannot be seen from {socket.gethostname()}" in report["failed"]
    assert "--retry-failed" in report["failed"]
    assert not list(tmp_path.iterdir())


def test_a_trial_makes_predictions_that_are_not_there_itself(
    toy, teacher, tmp_path, told, monkeypatch
):
    """On a cluster too: other trials hold the CPUs that more processes would wait for."""
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    (tmp_path / "search.yaml").touch()
    data = {"cache": str(tmp_path / "cache")}
    kd, workers, enough = {"alpha": 0.5}, 2, UserError("enough.")
    recipe = toy(tmp_path / "r", teacher=str(teacher), method=["lobert"], kd=kd, data=data,
                 workers=workers)  # fmt: skip
    found: list[Any] = []

    def fit(carrier: _Carrier, plan: Any, job: Any) -> dict[str, Any]:
        found.append(Predictions(job.predictions, cls=False).rows)
        return {"error": enough}

    monkeypatch.setattr(_Carrier, "fit", fit)
    run_trial(CONFIG, work_of(recipe, tmp_path, gpu=1.0))
    assert found == [90]
    assert told == [{"failed": "enough.", "values": {"train.lr": 1e-3}}]


def test_a_trial_that_storage_ends_is_left_to_be_tried_again(
    toy, teacher, tmp_path, told, monkeypatch
):
    """Tune does that with what is raised; what it is told is final."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raybert.checkpoint._seal", full)
    (tmp_path / "search.yaml").touch()
    recipe = toy(tmp_path / "r", teacher=str(teacher), method=["lobert"])
    with pytest.raises(TransientError, match=r"checkpoint .* No space left") as caught:
        run_trial(CONFIG, work_of(recipe, tmp_path))
    assert all("failed" not in report for report in told)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (TransientError, str(caught.value))


def memory_of(available: float, total: float):
    return lambda: SimpleNamespace(available=available, total=total)


def test_a_trial_needs_the_memory_that_others_give_back(toy, teacher, tmp_path, monkeypatch):
    recipe = toy(tmp_path / "r", teacher=str(teacher), method=["lobert"])
    monkeypatch.setattr(machine.psutil, "virtual_memory", memory_of(1, 1e12))
    with pytest.raises(UserError, match=r"0\.0 GiB are free"):
        make_plan(resolve_paths(recipe))
    assert plan_of(resolve_paths(recipe), {"train.lr": 1e-3}).memory > 1
    monkeypatch.setattr(machine.psutil, "virtual_memory", memory_of(1, 1))
    with pytest.raises(UserError, match=r"0\.0 GiB are all there is"):
        plan_of(resolve_paths(recipe), {"train.lr": 1e-3})


def test_a_trial_runs_beside_others_and_gives_gpu_memory_back(toy, tmp_path, told, monkeypatch):
    seen: list[Any] = []

    def compress(recipe: Any, **how: Any) -> None:
        seen.append(how["alone"])
        raise UserError("it saves nothing.")

    monkeypatch.setattr(trial, "compress", compress)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))
    recipe = toy(tmp_path / "r", teacher="t", method=["lobert"])
    (tmp_path / "search.yaml").touch()
    run_trial(CONFIG, work_of(recipe, tmp_path))
    assert seen == [False, "emptied"]
    assert told == [{"failed": "it saves nothing.", "values": {"train.lr": 1e-3}}]


def test_trials_read_the_rows_that_were_prepared(toy, teacher, tmp_path, told, monkeypatch):
    """A machine that does not see the raw ones would fail one trial after the other."""
    recipe = resolve_paths(toy(tmp_path / "r", teacher=str(teacher), method=["lobert"]))
    data = make_plan(recipe).data
    seen: list[str] = []

    def no_rows(*_: Any) -> None:
        raise UserError("no such file or folder.")

    def compress(recipe: Any, **how: Any) -> None:
        seen.append(make_plan(resolve_paths(recipe), data=how["data"]).data.key)
        raise UserError("it saves nothing.")

    monkeypatch.setattr("raybert.data._read", no_rows)
    monkeypatch.setattr(trial, "compress", compress)
    (tmp_path / "search.yaml").touch()
    run_trial(CONFIG, work_of(recipe, tmp_path, data=data.folder.name))
    assert seen == [data.key]
    run_trial(CONFIG, work_of(recipe, tmp_path, data="elsewhere"))
    assert [report["failed"] for report in told] == ["it saves nothing.", "no such file or folder."]


def test_a_running_trial_reports_what_is_known_of_every_objective(toy, teacher, tmp_path, told):
    """As the finished report will count them; what comes to its end is not told."""
    recipe = resolve_paths(toy(tmp_path / "r", teacher=str(teacher), method=["lobert"]))
    planned = make_plan(recipe)
    words = "score,retained,bytes,parameters,flops,seconds,min:student.parameters.rest"
    words += ",max:student.metrics.accuracy,max:ratio,min:training.tokens"
    objectives = parse_objectives(words, ("accuracy",))
    assert all(objective.while_running for objective in objectives)
    work = work_of(recipe, tmp_path, objectives=objectives)
    hooks = _TuneHooks(_Carrier(work, 0, {"train.lr": 1e-3}), planned)
    steps = sum(count for _, count in planned.phases)
    spent = {"seconds": 2.5, "tokens": 640}
    hooks.report({"accuracy": 0.8, "f1": 0.7, **spent, "phase": "lobert", "step": steps // 2})
    hooks.report({"accuracy": 0.8, "f1": 0.7, **spent, "phase": "lobert", "step": steps})
    (found,) = told
    majority = hooks.floor
    assert found == {
        "score": 0.8,
        "retained": pytest.approx((0.8 - majority) / (0.9 - majority)),
        "bytes": planned.after["bytes"],
        "parameters": planned.after["parameters"]["total"],
        "flops": planned.after["flops"],
        "seconds": 2.5,
        "min:student.parameters.rest": planned.after["parameters"]["rest"],
        "max:student.metrics.accuracy": 0.8,
        "max:ratio": pytest.approx(0.8 / 0.9),
        "min:training.tokens": 640,
        "percent": 100 * (steps // 2) / steps,
        "step": steps // 2,
        "values": {"train.lr": 1e-3},
    }


# -- taking over -----------------------------------------------------------------------------------


@pytest.fixture
def hand(toy, teacher, tmp_path, told, monkeypatch):
    """Hands trial 0 a checkpoint of a trial's, as Tune does; returns what it goes on with."""
    recipe = toy(tmp_path / "base", teacher=str(teacher), method=["lobert"])
    work = work_of(recipe, tmp_path, hands_over=True)
    given = tmp_path / "given"

    def take(number: int | None, values: dict[str, Any]) -> dict[str, Any]:
        checkpoint = None
        if number is not None:
            given.mkdir()
            (given / "state.pt").write_text("weights of another")
            (given / "metrics.jsonl").write_text("its log")
            (given / ORIGIN).write_text(json.dumps({"number": number, "checkpoint": "step-8"}))
            checkpoint = SimpleNamespace(as_directory=lambda: contextlib.nullcontext(given))
        monkeypatch.setattr(trial.tune, "get_checkpoint", lambda: checkpoint)
        return _take_over(work, 0, values, work.place(0, None))

    def begin() -> Path:
        """The run folder as the trial itself has left it."""
        folder = work.place(0, None)
        (folder / "checkpoints" / "step-8").mkdir(parents=True)
        (folder / "checkpoints" / "step-8" / "state.pt").write_text("its own weights")
        own = work.recipe_for(0, None, {"train.lr": 3e-3})
        (folder / "recipe.yaml").write_text(dump_recipe(make_plan(resolve_paths(own)).recipe))
        return folder

    return SimpleNamespace(take=take, begin=begin)


def test_a_trial_goes_on_from_anothers_checkpoint_with_changed_values(hand):
    folder = hand.begin()
    (folder / "checkpoints" / "step-16").mkdir()
    assert hand.take(1, {"train.lr": 4e-3}) == {"train.lr": 4e-3}
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == {"recipe.yaml", "metrics.jsonl", "checkpoints/step-8/state.pt"}, "alone"
    assert (folder / "checkpoints" / "step-8" / "state.pt").read_text() == "weights of another"
    assert (folder / "metrics.jsonl").read_text() == "its log"
    assert load_recipe(str(folder / "recipe.yaml")).train.lr == 4e-3
    assert not list(folder.parent.glob(".partial-*"))


def test_a_trial_that_had_nothing_yet_takes_over_too(hand, tmp_path):
    assert hand.take(1, {"train.lr": 4e-3}) == {"train.lr": 4e-3}
    assert (tmp_path / "trials" / "000" / "checkpoints" / "step-8" / "state.pt").is_file()


@pytest.mark.parametrize("number", [0, None])
def test_a_trial_that_goes_on_from_its_own_keeps_what_it_has(hand, number):
    """After a pause, or a search that was killed: what was changed is in the run folder."""
    folder = hand.begin()
    assert hand.take(number, {"train.lr": 1e-3}) == {"train.lr": 3e-3}
    assert (folder / "checkpoints" / "step-8" / "state.pt").read_text() == "its own weights"


def test_a_trial_without_anything_starts_with_what_was_drawn(hand, tmp_path):
    assert hand.take(None, {"train.lr": 1e-3}) == {"train.lr": 1e-3}
    assert not (tmp_path / "trials").exists()
