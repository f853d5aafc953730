"""Searches for real, on Ray: killed and continued, stopped early, as a population, on workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import tune as ray_tune

from raybert.cli import main
from raybert.draws import Plain
from raybert.errors import TransientError, UserError
from raybert.ledger import Ledger
from raybert.machine import own_cores
from raybert.recipe_file import dump_recipe, load_recipe
from raybert.run import compress
from raybert.search import tune
from raybert.trial import run_trial

pytestmark = pytest.mark.distributed

QUIET: dict[str, Any] = {"tell": lambda text: None}


@pytest.fixture
def start():
    """Starts `raybert tune` in a process of its own that can be killed, and is in the end."""
    started: list[subprocess.Popen] = []

    def begin(words: list[str]) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "raybert", "tune", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(true, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def finished_at(folder: Path) -> dict[str, int]:
    """When each finished trial's model was written."""
    models = folder.glob("trials/*/model/model.safetensors")
    done = [p for p in models if (p.parents[1] / "report.json").is_file()]
    return {p.parents[1].name: p.stat().st_mtime_ns for p in done}


def ended(folder: Path) -> int:
    """How many trials the ledger says have ended."""
    files = list(folder.glob("ledger/[0-9]*.json"))
    return sum('"state": "running"' not in file.read_text() for file in files)


def logs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines that each trial has logged which has a checkpoint."""
    begun = {path.parents[1] for path in folder.glob("trials/*/checkpoints/phase*-step*")}
    return {
        run.name: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in begun
    }


def test_a_killed_search_of_several_objectives_continues(start, toy, teacher, tmp_path, capsys):
    """Optuna for score and bytes, ASHA, one sample that diverges and some that save nothing."""
    out = tmp_path / "search"
    train = {"epochs": 4, "batch_size": 16}
    recipe = toy(out, teacher=str(teacher), method=["lobert"], train=train, kd={"alpha": 0.5})
    base, space = tmp_path / "base.yaml", tmp_path / "space.yaml"
    base.write_text(dump_recipe(recipe))
    axes = {
        "method.lobert.attention_rank": {"choice": [2, 4, 8, 31]},  # 31 of 32 saves nothing
        "method.lobert.ffn_rank": {"choice": [4, 8]},
        "train.lr": {"choice": [1e-7, 2e-3, 8e-3]},
    }
    space.write_text(yaml.safe_dump(axes))
    words = [str(base), "--space", str(space), "--trials", "7", "--scheduler", "asha"]
    words += ["--algorithm", "optuna", "--finalists", "2", "--seeds", "2", "--loss", "20%"]
    process = start(words)
    under_way: dict[str, list[dict[str, Any]]] = {}

    def in_the_middle() -> bool:
        under_way.clear()
        under_way.update(logs(out))
        return ended(out) >= 2 and bool(under_way)

    wait_until(in_the_middle, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished_at(out)
    drawn = {t.number: t.values for t in Ledger(out).trials}

    process = start(words)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "continuing" in output
    trials = Ledger(out).trials
    assert {name: finished_at(out)[name] for name in before} == before, "not trained again"
    assert {n: t.values for t in trials if (n := t.number) in drawn} == drawn, "nor drawn again"
    for name, lines in under_way.items():
        log = (out / "trials" / name / "metrics.jsonl").read_text().splitlines()
        steps = [line["run_step"] for line in map(json.loads, log) if line["kind"] == "eval"]
        assert json.loads(log[0]) == lines[0], "it went on from its checkpoint"
        assert steps == sorted(set(steps))
    states = [trial.state for trial in trials]
    assert len(states) - states.count("skipped") == 7
    assert "running" not in states
    assert "stopped" in states, "ASHA has stopped some"
    assert not list(out.glob("*/*/checkpoints")), "what has ended goes on from nothing"
    saves_nothing = [t for t in trials if t.values["method.lobert.attention_rank"] == 31]
    assert {t.state for t in saves_nothing} <= {"skipped"}
    assert not any((out / "trials" / t.name).exists() for t in saves_nothing)
    best = load_recipe(str(out / "best.yaml"))
    assert best.teacher == recipe.teacher or Path(best.teacher or "").parent == teacher
    again = {p.name for p in (out / "finalists").iterdir()}
    assert len(again) == min(2, states.count("finished"))
    assert all((out / "finalists" / name / "report.json").is_file() for name in again)
    assert "<title>trial" in (out / "report.html").read_text()
    assert not (out / "ray").exists()
    capsys.readouterr()
    assert main(["tune", *words]) == 0
    told = capsys.readouterr()
    answered = told.out + told.err
    assert "trial 0" in answered
    assert "stopped early" not in answered, "a finished search is only answered again"


def test_trials_fail_alone_and_a_search_without_any_says_why(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"], train={"epochs": 1})
    settings = {"algorithm": "grid", "finalists": 0, **QUIET}
    bad = {"train.lr": ray_tune.grid_search([1e30]), "train.clip": 0.0}
    with pytest.raises(UserError, match=r"no trial has finished \(1 failed\).*a number"):
        tune(recipe, bad, **settings)
    assert Ledger(tmp_path / "s").trials[0].state == "failed"
    some = recipe.model_copy(update={"out": str(tmp_path / "t")})
    answer = tune(some, {**bad, "train.lr": ray_tune.grid_search([1e30, 1e-3])}, **settings)
    assert [trial.state for trial in answer.trials] == ["failed", "finished"]
    assert answer.winner.trial.number == 1
    assert "stopped being a number" in (answer.folder / "report.html").read_text()
    # The same recipe by `compress`, in this process, comes to the same.
    alone = answer.best.model_copy(update={"out": str(tmp_path / "alone"), "export": None})
    run = compress(alone, **QUIET)
    report = json.loads((run / "report.json").read_text())
    found = json.loads((answer.folder / "trials" / "001" / "report.json").read_text())
    assert report["student"]["metrics"] == found["student"]["metrics"]
    assert report["teacher"]["metrics"] == found["teacher"]["metrics"]


@pytest.mark.long
def test_ctrl_c_ends_with_the_best_so_far(start, toy, teacher, tmp_path):
    """As a terminal does it: the signal goes to every process that the command has started."""
    out = tmp_path / "search"
    recipe = toy(out, teacher=str(teacher), method=["lobert"], train={"epochs": 2})
    base, space = tmp_path / "base.yaml", tmp_path / "space.yaml"
    base.write_text(dump_recipe(recipe))
    # One is soon done; the other would go on for hours.
    space.write_text("train.epochs: {grid: [1, 5000]}\n")
    words = [str(base), "--space", str(space), "--algorithm", "grid", "--loss", "90%"]
    process = start(words)
    wait_until(lambda: ended(out) == 1, process)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert time.monotonic() - began < 60
    assert "interrupted; the best so far" in output
    assert load_recipe(str(out / "best.yaml")).train.epochs == 1
    assert "<title>trial" in (out / "report.html").read_text()
    assert [trial.state for trial in Ledger(out).trials] == ["finished", "running"]
    assert not (out / "ray").exists()


@pytest.mark.long
def test_a_trial_that_crashes_is_tried_again_and_then_reported(toy, teacher, tmp_path, monkeypatch):
    """The first dies once, and the fourth's storage is full once; the second always dies, and the
    fifth's storage stays full; the third is well."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def dies(config: dict, work: Any) -> None:
        number = config["number"]
        tries = len(list(marks.glob(f"{number}-*")))
        (marks / f"{number}-{tries}").touch()
        if number == 1 or (number == 0 and tries == 0):
            os._exit(1)
        if number == 4 or (number == 3 and tries == 0):
            raise TransientError("the disk is full.")
        run_trial(config, work)

    monkeypatch.setattr("raybert.tuning.run_trial", dies)
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"], train={"epochs": 1})
    told: list[str] = []
    settings: dict[str, Any] = {"algorithm": "grid", "finalists": 0, "retries": 1}
    settings["tell"] = told.append
    rates = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    answer = tune(recipe, {"train.lr": ray_tune.grid_search(rates)}, **settings)
    states = [trial.state for trial in answer.trials]
    assert states == ["finished", "failed", "finished", "finished", "failed"]
    tries = {p.name for p in marks.iterdir()}
    assert tries == {"0-0", "0-1", "1-0", "1-1", "2-0", "3-0", "3-1", "4-0", "4-1"}
    assert answer.trials[4].reason == "the disk is full"
    assert any(text.startswith("trial 001 failed: ") for text in told), told
    assert answer.trials[1].reason in (answer.folder / "report.html").read_text()


@pytest.mark.long
def test_median_stopping_ends_what_does_worse_than_most(toy, teacher, tmp_path, monkeypatch):
    """A failed trial, which has no score, is among those that the others are compared with; and
    the next one waits for the process that a stopped one is slow to leave."""

    def slow_to_leave(config: dict, work: Any) -> None:
        try:
            run_trial(config, work)
        except SystemExit:
            time.sleep(5)
            raise

    monkeypatch.setattr("raybert.tuning.run_trial", slow_to_leave)
    recipe = toy(
        tmp_path / "s",
        teacher=str(teacher),
        method=["lobert"],
        train={"epochs": 4, "eval_every": 3, "clip": 0.0},
    )
    rates = [8e-3, 1e30, 6e-3, 7e-3, 0.3, 5e-3]
    settings: dict[str, Any] = {"algorithm": "grid", "scheduler": "median", "objectives": "score"}
    settings |= {"finalists": 0, "concurrent": 1, **QUIET}
    answer = tune(recipe, {"train.lr": ray_tune.grid_search(rates)}, **settings)
    states = {trial.values["train.lr"]: trial.state for trial in answer.trials}
    assert states[1e30] == "failed"
    assert states[0.3] == "stopped"
    assert [states[rate] for rate in (8e-3, 6e-3, 7e-3)] == ["finished"] * 3
    assert states[5e-3] in ("finished", "stopped"), "it was not lost"
    assert answer.trials[4].curve[-1][0] < 100


@pytest.mark.long
def test_minutes_leave_time_for_finalists(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"], train={"epochs": 1})
    axes = {"train.lr": ray_tune.loguniform(1e-4, 1e-2)}
    told: list[str] = []
    settings: dict[str, Any] = {"algorithm": "random", "trials": 500, "minutes": 2.0}
    settings |= {"finalists": 1, "seeds": 2}
    began = time.monotonic()
    answer = tune(recipe, axes, **settings, tell=told.append)
    assert time.monotonic() - began < 240
    assert 1 <= len(answer.trials) < 500
    assert answer.winner.score.n == 2, "there was time for a second seed"
    assert any("the time for trials is over" in text for text in told)


@pytest.mark.long
@pytest.mark.skipif(own_cores() < 2, reason="needs two cores")
def test_trials_of_two_workers_come_to_the_same_as_of_one(toy, teacher, tmp_path):
    axes = {"train.lr": ray_tune.grid_search([2e-3])}
    settings = {"algorithm": "grid", "trials": 1, "finalists": 0, **QUIET}
    results = {}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        keys = {"method": ["lobert"], "workers": workers}
        # Each worker draws its own dropout.
        recipe = toy(out, teacher=str(teacher), train={"dropout": 0.0}, **keys)
        answer = tune(recipe, axes, **settings)
        results[workers] = answer.winner.reports[0]
        assert answer.trials[0].cores == workers * (own_cores() // workers)
        assert len(answer.trials[0].curve) > 1, "evaluations reached Tune"
    assert results[1].student.metrics == pytest.approx(results[2].student.metrics, abs=0.03)


@pytest.mark.long
@pytest.mark.skipif(own_cores() < 2, reason="needs two cores")
def test_trials_of_two_workers_are_stopped_early(toy, teacher, tmp_path):
    train = {"epochs": 4, "eval_every": 3, "clip": 0.0}
    keys = {"method": ["lobert"], "workers": 2, "resources": {"cpus": 1}}
    recipe = toy(tmp_path / "s", teacher=str(teacher), train=train, **keys)
    axes = {"train.lr": ray_tune.grid_search([6e-3, 0.3, 5e-3])}
    settings: dict[str, Any] = {"scheduler": "asha", "objectives": "score", "finalists": 0}
    answer = tune(recipe, axes, concurrent=1, **settings, **QUIET)
    good, bad, _ = answer.trials
    assert (good.state, bad.state) == ("finished", "stopped")
    assert bad.curve[-1][0] < 100
    assert not list(answer.folder.glob("trials/001/checkpoints/*"))


@pytest.mark.long
def test_a_population_takes_over_the_better_weights(toy, teacher, tmp_path):
    """Half of the population learns nothing, and goes on from what the other half has learned."""
    # Four looks at the population: at the first ones there may be nobody to take over from.
    train = {"epochs": 8, "eval_every": 5, "batch_size": 16}
    kd = {"alpha": 0.5}
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"], train=train, kd=kd)
    axes = {"train.lr": ray_tune.loguniform(1e-6, 1e-2), "kd.alpha": ray_tune.uniform(0.1, 0.9)}
    settings = {"scheduler": "pbt", "trials": 4, "finalists": 0, **QUIET}
    answer = tune(recipe, axes, **settings)
    assert [trial.state for trial in answer.trials] == ["finished"] * 4
    drawn = Plain(answer.space, recipe.train.seed)
    changed = [t for t in answer.trials if t.values != drawn.ask(t.number)]
    assert changed, "nobody took over"
    for trial in changed:
        assert 1e-6 <= trial.values["train.lr"] <= 1e-2
        assert 0.1 <= trial.values["kd.alpha"] <= 0.9
        run = answer.folder / "trials" / trial.name
        assert load_recipe(str(run / "recipe.yaml")).train.lr == trial.values["train.lr"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line["run_step"] for line in lines if line["kind"] == "eval"]
        assert steps == sorted(steps)
        assert steps[-1] == 48
