"""One trial without Ray: what it is allowed, what it reports, what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raybert import plan, trial
from raybert.config import UserError
from raybert.objectives import parse_objectives
from raybert.plan import make_plan, resolve_paths
from raybert.search_plan import plan_of
from raybert.trial import Work, _Carrier, _TuneHooks, run_trial


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
    }
    return Work(recipe, folder, **{**shared, **keys})


def memory_of(available: float, total: float):
    return lambda: SimpleNamespace(available=available, total=total)


def test_a_trial_needs_the_memory_that_others_give_back(toy, teacher, tmp_path, monkeypatch):
    recipe = toy(tmp_path / "r", teacher=str(teacher), method=["lobert"])
    monkeypatch.setattr(plan.psutil, "virtual_memory", memory_of(1, 1e12))
    with pytest.raises(UserError, match=r"0\.0 GiB are free"):
        make_plan(resolve_paths(recipe))
    assert plan_of(resolve_paths(recipe), {"train.lr": 1e-3}).memory > 1
    monkeypatch.setattr(plan.psutil, "virtual_memory", memory_of(1, 1))
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
    config = {"number": 0, "seed": None, "values": {"train.lr": 1e-3}, "population": None}
    run_trial(config, work_of(recipe, tmp_path))
    assert seen == [False, "emptied"]
    assert told == [{"failed": "it saves nothing.", "values": {"train.lr": 1e-3}}]


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
