"""Searches without Ray: what is drawn, skipped, shared out, chosen, refused and shown."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray import tune as ray_tune
from ray.tune.search import Searcher

from raybert.cli import main
from raybert.draws import FAILS, SKIPS, Draws, Optuna, Plain, as_grid, make_source
from raybert.errors import TransientError, UserError
from raybert.finalists import Finished, choose, finalists_of, parse_loss, read_finished, rule
from raybert.ledger import Ledger, Trial, run_folder
from raybert.loggers import make_loggers
from raybert.objectives import front, in_trials, parse_objectives
from raybert.recipe_file import load_recipe, recipe_from
from raybert.report import write_run_report
from raybert.results import build, latency_ms
from raybert.room import check_seen, held_by_others, wait_for_room
from raybert.search import (
    _as_trials_read_it,
    _find_room,
    _is_done,
    _measure,
    _nothing,
    _save_predictions,
    _why_not,
    run_search,
    tune,
    write_answer,
)
from raybert.search_plan import Settings, check_place, describe, make_search, shares_of
from raybert.search_results import Answer, answer_of, importance, summary
from raybert.shares import Shares, share_out
from raybert.space import Space, make_space
from raybert.steering import make_scheduler, remember
from raybert.trial import Work
from raybert.tuning import HEAD, Ending, Runner, Scribe, part_of_head

GB = 1_000_000_000
METRICS = ("accuracy", "f1")
SCORE_BYTES = parse_objectives("score,bytes", METRICS)
BASE = recipe_from({"teacher": "teacher", "method": ["lobert"], "task": "demo"})
AXES = {
    "method.lobert.share": ray_tune.uniform(0.2, 0.8),
    "train.lr": ray_tune.loguniform(1e-5, 1e-3),
    "kd.normalize": ray_tune.choice([True, False]),
}
SPACE = make_space(AXES, "toy", BASE)


@dataclass(eq=False)
class SimpleTrial:
    """As much of Tune's trial as schedulers look at."""

    trial_id: str


@dataclass(frozen=True)
class RunningTrial:
    """As much of Tune's trial as loggers look at."""

    name: str
    config = MappingProxyType({"values": {}})

    def __str__(self) -> str:
        return self.name


def report_of(score: float, size: int, *, seed: int = 42, milliseconds: float | None = None):
    """A run's report with only what matters here; the teacher has 0.9 and 1000 bytes."""

    def model(value: float, weights: int) -> dict:
        return {
            "metrics": {"accuracy": value},
            "parameters": {"total": weights // 4, "embeddings": 1, "rest": 1},
            "bytes": {"weights": weights, "total": weights},
            "flops": weights,
        }

    timed = [("student", milliseconds), ("teacher", 10.0)] if milliseconds else []
    rows = [
        {"model": name, "backend": "torch", "device": "cpu", "batch": batch, "length": 8,
         "p50_ms": ms * batch, "p95_ms": ms, "mean_ms": ms, "throughput": 1.0, "repeats": 1,
         "threads": 1, "peak_memory_mb": 1.0}
        for name, ms in timed for batch in (1, 8)
    ]  # fmt: skip
    return build(
        name="run", task="demo", kind="classification", metric="accuracy", model="toy",
        methods=[{"name": "lobert"}], seed=seed, workers=1, student=model(score, size),
        teacher=model(0.9, 1000), floors={"accuracy": 0.5}, latency=rows,
        training={"steps": 1, "seconds": 1.0, "tokens": 1, "phases": []}, hardware={"cpu": "toy"},
    )  # fmt: skip


def finished(number: int, scores, size: int, **keys) -> Finished:
    reports = [report_of(s, size, seed=42 + n, **keys) for n, s in enumerate(scores)]
    return Finished(Trial(number, {}, "finished"), tuple(reports))


# -- objectives ------------------------------------------------------------------------------------


def test_objectives_are_numbers_of_a_report():
    report = report_of(0.8, 400, milliseconds=5.0)
    words = "score,retained,bytes,parameters,flops,latency,seconds,max:student.metrics.accuracy"
    found = {o.name: o.of(report) for o in parse_objectives(words, METRICS)}
    assert found.pop("retained") == pytest.approx(0.75)
    assert list(found.values()) == [0.8, 400, 100, 400, 5.0, 1.0, 0.8]
    assert latency_ms(report_of(0.8, 400)) is None
    assert [o.name for o in in_trials(parse_objectives("latency,flops,score", METRICS))] == [
        "flops",
        "score",
    ]


def test_the_front_is_what_no_other_beats():
    rows = [(0.9, 100), (0.8, 50), (0.7, 60), (0.9, 100), (0.95, None), (float("nan"), 1)]
    named = [{"score": score, "bytes": size} for score, size in rows]
    assert front(named, SCORE_BYTES) == [True, True, False, True, False, False]


# -- resources -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "nodes", "asked", "wanted"),
    [
        ({}, [(2, 0)], {"trials": 8}, Shares(1, 0, 2)),
        ({}, [(16, 0)], {"trials": 4}, Shares(4, 0, 4)),
        ({"resources": {"cpus": 3}}, [(8, 0)], {"trials": 9}, Shares(3, 0, 2)),
        ({}, [(16, 0)], {"trials": 8, "concurrent": 2}, Shares(8, 0, 2)),
        ({"workers": 2}, [(8, 0)], {"trials": 2}, Shares(2, 0, 2)),
        ({"workers": 3, "resources": {"cpus": 2}}, [(4, 0)] * 2, {"trials": 9}, Shares(2, 0, 1)),
        ({}, [(3, 0), (3, 0)], {"trials": 1}, Shares(3, 0, 1)),
        ({}, [(8, 1)], {"trials": 9, "gpu": 0.25}, Shares(2, 0.25, 4)),
        ({"resources": {"cpus": 1}}, [(8, 1)], {"trials": 9, "gpu": 0.5}, Shares(1, 0.5, 2)),
        ({"workers": 2}, [(8, 4)], {"trials": 9, "gpu": 0.25}, Shares(2, 1, 2)),
        ({}, [(8, 1)], {"trials": 9, "gpu": 0.5, "memory": GB, "gpu_memory": 3 * GB},
         Shares(4, 0.5, 2)),
        ({"resources": {"gpu": False}}, [(8, 1)], {"trials": 8}, Shares(1, 0, 8)),
        ({}, [(8, 0)], {"trials": 8, "memory": 4 * GB, "free": 15 * GB}, Shares(2, 0, 3)),
        ({}, [(8, 0)], {"trials": 8, "memory": 4 * GB, "free": 10 * GB}, Shares(4, 0, 2)),
        ({}, [(8, 0)], {"trials": 8, "memory": 4 * GB, "free": 2 * GB}, Shares(8, 0, 1)),
        # Each process takes its libraries too, one that watches several workers among them.
        ({}, [(8, 0)], {"trials": 8, "memory": GB, "free": 6 * GB}, Shares(2, 0, 3)),
        ({"workers": 2}, [(8, 0)], {"trials": 8, "memory": GB, "free": 8 * GB}, Shares(4, 0, 1)),
    ],
)  # fmt: skip
def test_all_trials_that_start_find_room(keys, nodes, asked, wanted):
    assert share_out(recipe_from({"teacher": "t", **keys}), nodes, **asked) == wanted


@pytest.mark.parametrize(
    ("keys", "nodes", "asked", "message"),
    [
        ({"workers": 4}, [(2, 0)], {}, "4 workers of 1 CPU fits nowhere.*at most workers=2"),
        ({"resources": {"cpus": 6}}, [(4, 0), (4, 0)], {}, "6 CPUs fits nowhere"),
        ({"resources": {"gpu": True}}, [(4, 0)], {}, "1 GPU fits nowhere.*resources.gpu=false"),
        ({}, [(0, 0)], {}, r"there are 0 CPUs .* for ever; use resources\.wait=15 where a cluster"),
        ({"resources": {"wait": 5}}, [(0, 0)], {}, r"use a larger resources\.wait than 5 where"),
        ({"workers": 2}, [(8, 0)], {"concurrent": 5}, "5 trials at once.*at most --concurrent 4"),
        ({}, [(8, 1)], {"gpu": 2.0}, "share of a GPU is 2"),
        (
            {},
            [(8, 1)],
            {"gpu": 0.25, "memory": 9 * GB, "gpu_memory": 24 * GB},
            r"needs about 8\.4 GiB, and --gpu 0\.25 is 5\.6 GiB of a GPU's 22\.4\. Use a larger",
        ),
        (
            {},
            [(8, 0)],
            {"concurrent": 4, "memory": 4 * GB, "free": 10 * GB},
            r"9\.3 GiB for trials of 4\.4 GiB.*at most --concurrent 2, a smaller train\.batch_size",
        ),
    ],
)
def test_what_would_wait_for_ever_is_refused(keys, nodes, asked, message):
    with pytest.raises(UserError, match=message):
        share_out(recipe_from({"teacher": "t", **keys}), nodes, **{"trials": 8, **asked})


class Growing:
    """A cluster that starts a machine of two CPUs each time it is waited for, two at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.nodes, self.asked, self.removed = 0.0, [(0, 0)], [], 0
        groups = importlib.import_module("ray.util.placement_group")
        monkeypatch.setattr(groups, "placement_group", self.group)
        monkeypatch.setattr(groups, "remove_placement_group", self.remove)
        monkeypatch.setattr("raybert.room.time.monotonic", lambda: self.now)
        for user in ("room", "search_plan"):
            monkeypatch.setattr(f"raybert.{user}.machines", lambda: self.nodes)

    def group(self, bundles: list[dict[str, float]]) -> SimpleNamespace:
        self.asked.append(bundles)
        place = len(self.asked)
        return SimpleNamespace(wait=lambda seconds: self.wait(place))

    def wait(self, place: int) -> bool:
        self.now += 60
        if len(self.nodes) < 3:
            self.nodes = [*self.nodes, (2, 0)]
        return place <= sum(cpus for cpus, _ in self.nodes)

    def remove(self, group: SimpleNamespace) -> None:
        self.removed += 1


@pytest.mark.parametrize(
    ("keys", "trials", "minutes"),
    [({}, 3, 3), ({}, 8, 20), ({"workers": 2, "resources": {"wait": 20, "gpu": True}}, 2, 2)],
)
def test_a_search_asks_for_room_and_waits_for_it(monkeypatch, keys, trials, minutes):
    cluster = Growing(monkeypatch)
    recipe = recipe_from({"teacher": "t", "resources": {"wait": 20}, **keys})
    wait_for_room(recipe, trials, 0.5)
    bundle = {"CPU": 1, "GPU": 1} if recipe.resources.gpu else {"CPU": 1}
    assert cluster.asked == [[bundle] * recipe.workers] * trials, "each for itself"
    assert cluster.now == 60 * minutes
    assert cluster.removed == trials


def test_a_cluster_that_was_waited_for_does_with_fewer_trials_at_once(
    toy, teacher, tmp_path, monkeypatch
):
    cluster = Growing(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    keys = {"teacher": str(teacher), "method": ["lobert"], "resources": {"wait": 9, "cpus": 1}}
    search = make_search(toy(tmp_path / "s", **keys), AXES, Settings(concurrent=6, trials=9))
    cluster.nodes = [(0, 0), (2, 0), (2, 0)]
    assert shares_of(search) == Shares(1, 0, 4)
    cluster.nodes = [(0, 0), (64, 0)]
    assert shares_of(search) == Shares(1, 0, 6)
    cluster.nodes = [(0, 0)]
    with pytest.raises(UserError, match=r"a larger resources\.wait than 9"):
        shares_of(search)
    # All of it: asked for, looked at from its machines, and shared out.
    told: list[str] = []
    monkeypatch.setattr("raybert.search.check_seen", lambda file: told.append(str(file)))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "memory": 1.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    ledger, drawn = Ledger(tmp_path), Plain(search.space, 0)
    assert _find_room(search, drawn, ledger, told.append) == Shares(1, 0, 4)
    assert len(cluster.asked) == 6
    seen, held = told[1:]
    assert seen == str(search.folder / "search.yaml")
    assert held.startswith(
        "note: others hold 3 of the cluster's 4 CPUs, and all trials at once take 4"
    )
    assert "up to 9 minutes for room for 6 trials" in told[0]
    # No more than a grid has, but for the finalists' seeds.
    grid = Plain(make_space({"train.lr": ray_tune.grid_search([1e-4, 1e-3])}, "two", BASE), 0)
    _find_room(search, grid, ledger, told.append)
    assert len(cluster.asked) == 6 + max(2, search.settings.finalists) < 12


@pytest.mark.parametrize(
    ("there", "free", "said"),
    [
        ({"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, ""),
        ({"CPU": 16.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}, ""),
        ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0}, "others hold 6 of the cluster's 8 CPUs"),
        ({"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}, "others hold 2 of the cluster's 2 GPUs"),
    ],
)
def test_what_others_hold_is_told(monkeypatch, there, free, said):
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    monkeypatch.setattr("ray.available_resources", lambda: free)
    held = held_by_others(Shares(2, 0.5, 2), 1)
    assert bool(held) == bool(said)
    assert held.startswith(said)


def test_a_machine_that_does_not_see_the_search_is_named(tmp_path, monkeypatch):
    """The cluster is one machine thrice: the head has no CPUs, and one is gone."""
    nodes = [
        {"Alive": alive, "Resources": {"CPU": cpus} if cpus else {}, "NodeID": "ab" * 28}
        for alive, cpus in ((True, 0), (True, 2), (False, 2))
    ]
    asked: list[Path] = []

    class Look:
        def __init__(self, function) -> None:
            self.function = function

        def options(self, **_: object) -> Look:
            return self

        def remote(self, file: Path) -> str:
            asked.append(file)
            return self.function(file)

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", lambda **_: Look)
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(ray, "get", lambda refs: refs)
    file = tmp_path / "search.yaml"
    with pytest.raises(UserError, match=f"{tmp_path} cannot be seen from {socket.gethostname()},"):
        check_seen(file)
    file.touch()
    check_seen(file)
    assert asked == [file, file]


@pytest.mark.parametrize(
    ("keys", "hands_over", "wanted"),
    [
        ({}, False, {"CPU": 2, "GPU": 0.5}),
        ({}, True, [{"CPU": 2, "GPU": 0.5}, {HEAD: 0.2857}]),
        ({"workers": 2}, True, {"CPU": 0, HEAD: 0.2857}),
    ],
)
def test_a_trial_takes_its_own_share_and_no_more(tmp_path, keys, hands_over, wanted):
    """A population of three on ten machines of two CPUs: none has the CPUs of three."""
    recipe = recipe_from({"teacher": "t", **keys})
    work = Work(recipe, tmp_path, SCORE_BYTES, 2, 0.5, hands_over, (), {}, None, "none")
    how = {"retries": 0, "deadline": 0.0, "last_start": 0.0, "loggers": [], "tell": print}
    taken = Runner(work, Shares(2, 0.5, 3), Ledger(tmp_path), **how).resources()
    assert (taken if isinstance(taken, dict) else taken.bundles) == wanted


@pytest.mark.parametrize("concurrent", [1, 2, 3, 10, 16, 45, 99])
def test_as_many_trials_as_are_wanted_find_a_part_of_the_head(concurrent):
    units = round(10_000 * part_of_head(concurrent))  # as Ray counts them
    assert concurrent * units <= 10_000 < (concurrent + 1) * units


# -- drawing ---------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_number_alone():
    first, again = Plain(SPACE, seed=1), Plain(SPACE, seed=1)
    samples = [first.ask(number) for number in range(6)]
    assert again.ask(4) == samples[4]
    assert len({json.dumps(sample) for sample in samples}) == 6
    assert Plain(SPACE, seed=2).ask(4) != samples[4]


def test_a_grid_is_every_combination_once():
    axes = {"train.lr": ray_tune.choice([1e-4, 1e-3]), "kd.cls": ray_tune.grid_search([0.0, 1.0])}
    source = Plain(as_grid(make_space(axes, "grid", BASE)), seed=0)
    found = [source.ask(number) for number in range(4)]
    assert source.ask(4) is None
    assert len({json.dumps(values) for values in found}) == 4
    with pytest.raises(UserError, match=r"no grid: method\.lobert\.share, train\.lr"):
        as_grid(SPACE)
    with pytest.raises(UserError, match="Optuna cannot sample"):
        make_source("optuna", make_space(axes, "grid", BASE), BASE, SCORE_BYTES, 0)


class Refuses:
    """A check that refuses shares above a bound, and counts what it was asked."""

    def __init__(self, above: float) -> None:
        self.above, self.asked = above, 0

    def __call__(self, values: dict) -> str:
        self.asked += 1
        share = values["method.lobert.share"]
        return "it saves nothing." if share > self.above else ""


def test_no_trial_starts_when_time_is_up(tmp_path):
    ledger = Ledger(tmp_path)
    draws = Draws(Plain(SPACE, 0), ledger, BASE, Refuses(1.0), 5, print, until=time.time() - 1)
    assert not draws.has_next()
    assert ledger.trials == []


def drain(draws: Draws) -> list[dict]:
    found = []
    while (config := draws.suggest("x")) != Searcher.FINISHED:
        found.append(config)
    return found


def test_what_saves_nothing_is_skipped_before_it_starts(tmp_path):
    told: list[str] = []
    check = Refuses(above=0.5)
    draws = Draws(Plain(SPACE, 0), Ledger(tmp_path), BASE, check, 5, told.append)
    found = drain(draws)
    assert len(found) == 5
    assert all(config["values"]["method.lobert.share"] <= 0.5 for config in found)
    skipped = [t for t in Ledger(tmp_path).trials if t.state == "skipped"]
    assert len(skipped) == check.asked - 5 == len(told) > 0
    assert skipped[0].reason == "it saves nothing."


def test_illegal_chains_are_skipped_before_they_start(toy, teacher, tmp_path):
    base = make_search(toy(tmp_path / "s", teacher=str(teacher)), {"method": "lobert"}).recipe
    chains = ["lobert", "q8bert,lobert", "lobert,ebert", "lobert,q8bert"]
    space = make_space({"method": {"grid_search": chains}}, "chains", base)
    found = drain(
        Draws(Plain(space, 0), Ledger(tmp_path), base, partial(_why_not, base, None), 9, print)
    )
    assert [config["values"]["method"] for config in found] == ["lobert", "lobert,q8bert"]
    reasons = {t.values["method"]: t.reason for t in Ledger(tmp_path).trials if t.reason}
    assert reasons["q8bert,lobert"].startswith("lobert cannot follow q8bert")
    assert reasons["lobert,ebert"].startswith("ebert cannot follow lobert")
    assert not (tmp_path / "trials").exists()


def test_a_space_of_nothing_but_mistakes_ends(tmp_path):
    check = Refuses(above=0.0)
    draws = Draws(Plain(SPACE, 0), Ledger(tmp_path), BASE, check, 5, print)
    assert drain(draws) == []
    assert check.asked == SKIPS


def test_a_grid_is_walked_to_its_end_past_its_mistakes(tmp_path):
    lr = [n / 1000 for n in range(1, 2 * SKIPS)]
    axes = {"method.lobert.share": {"grid_search": [0.9, 0.5]}, "train.lr": {"grid_search": lr}}
    source = Plain(make_space(axes, "block", BASE), 0)
    found = drain(Draws(source, Ledger(tmp_path), BASE, Refuses(above=0.5), 1000, print))
    assert [config["values"]["train.lr"] for config in found] == lr


def test_what_storage_ends_says_nothing_of_a_sample(tmp_path, monkeypatch):
    """It would be skipped for ever, and a grid would lack that point."""

    def away(*_):
        raise TransientError("the bucket does not answer")

    monkeypatch.setattr("raybert.search.plan_of", away)
    draws = Draws(Plain(SPACE, 0), Ledger(tmp_path), BASE, partial(_why_not, BASE, None), 5, print)
    with pytest.raises(TransientError, match="does not answer"):
        draws.suggest("t")
    assert Ledger(tmp_path).trials == []


CHAINS = {
    "method": {"grid_search": ["lobert", "theseus"]},
    "method.theseus.layers": {"grid_search": [2, 3]},
    "method.lobert.share": {"grid_search": [0.4, 0.5, 0.6]},
}
"""A grid of twelve points that are five recipes: each chain has but one of the parameters."""


def test_a_grid_trains_no_recipe_twice(tmp_path):
    base, told = recipe_from({"teacher": "t"}), []
    source = Plain(make_space(CHAINS, "chains", base), 0)
    found = drain(Draws(source, Ledger(tmp_path), base, lambda values: "", 5, told.append))
    assert len({json.dumps(config["values"]) for config in found}) == len(found) == 5
    trials = Ledger(tmp_path).trials
    assert trials[3].reason == "the same as trial 000."
    assert len(told) == sum(trial.state == "skipped" for trial in trials)
    # What was drawn before is walked past, and the rest of the grid repeats it.
    assert not drain(Draws(source, Ledger(tmp_path), base, lambda values: "", 99, told.append))[5:]


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_space_of_few_recipes_ends_when_all_were_drawn(tmp_path, algorithm):
    axes = {"train.lr": ray_tune.choice([1e-4, 1e-3]), "kd.cls": ray_tune.choice([0.0, 1.0])}
    told: list[str] = []
    source = make_source(algorithm, make_space(axes, "few", BASE), BASE, SCORE_BYTES, 0)
    draws = Draws(source, Ledger(tmp_path), BASE, lambda values: "", 16, told.append)
    found = []
    while (config := draws.suggest("x")) != Searcher.FINISHED:
        found.append(config["values"])
        trial = draws.ledger.get(config["number"])
        assert trial is not None
        trial.state, trial.results = "finished", {"score": 0.5, "bytes": 1.0}
        draws.ledger.write(trial)
        draws.told(trial)
    assert len({json.dumps(values) for values in found}) == len(found) == 4
    assert [trial.number for trial in draws.ledger.trials] == [0, 1, 2, 3]
    assert not draws.hopeless
    assert "hardly more than these 4" in told[0]


@pytest.mark.parametrize(("evaluated", "drawn"), [(None, FAILS), (1, 16)])
def test_where_every_trial_fails_at_once_no_more_are_started(tmp_path, evaluated, drawn):
    axes, told, found = {"train.lr": ray_tune.uniform(1e-5, 1e-3)}, [], []
    source = Plain(make_space(axes, "given", BASE), 0)
    draws = Draws(source, Ledger(tmp_path), BASE, lambda values: "", 16, told.append)
    while (config := draws.suggest("x")) != Searcher.FINISHED:
        trial = draws.ledger.get(config["number"])
        assert trial is not None
        trial.state, trial.reason = "failed", "no room on the device"
        trial.curve = [[50.0, 0.5]] if trial.number == evaluated else []
        draws.ledger.write(trial)
        draws.told(trial)
        found.append(trial)
    assert len(found) == drawn
    assert sum("have failed before any was evaluated" in text for text in told) == (drawn == FAILS)
    again = Draws(source, Ledger(tmp_path), BASE, lambda values: "", 16, told.append)
    assert again.has_next() == (drawn == FAILS), "another start tries again"


def test_optuna_does_not_take_its_favourite_for_the_end_of_a_space(tmp_path):
    pytest.importorskip("optuna")
    choices = {key: ray_tune.choice([0.0, 1.0, 2.0]) for key in ("kd.cls", "kd.hidden")}
    axes = {**choices, "train.lr": ray_tune.choice([1e-4, 2e-4, 3e-4])}
    told: list[str] = []
    source = Optuna(make_space(axes, "choices", BASE), BASE, SCORE_BYTES, 0)
    draws = Draws(source, Ledger(tmp_path), BASE, lambda values: "", 24, told.append)
    found = []
    while (config := draws.suggest("x")) != Searcher.FINISHED:
        found.append(json.dumps(config["values"], sort_keys=True))
        trial = draws.ledger.get(config["number"])
        assert trial is not None
        best = config["values"]["kd.cls"] == 2.0  # worth coming back to
        trial.state, trial.results = "finished", {"score": 0.5 + 0.4 * best, "bytes": 1.0}
        draws.ledger.write(trial)
        draws.told(trial)
    assert len(set(found)) == len(found) == 24  # of 27
    assert not told


def test_optuna_goes_on_in_a_space_of_tuples(tmp_path):
    axes = {"kd.layer_map": ray_tune.choice([(1, 2), (3, 4), (2, 4)])}
    space = make_space(axes, "maps", BASE)
    first = Optuna(space, BASE, SCORE_BYTES, seed=0).ask(0)
    Ledger(tmp_path).write(Trial(0, first or {}, "finished"))
    (known,) = Ledger(tmp_path).trials
    again = Optuna(space, BASE, SCORE_BYTES, seed=1)
    again.remember(0, known.values)
    again.tell(0, {"score": 0.5, "bytes": 1.0})
    assert again.study.trials[0].params == first == known.values


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_a_space_of_mistakes_leaves_an_answer_where_a_trial_has_finished(tmp_path, state):
    ledger, told = Ledger(tmp_path), []
    ledger.write(Trial(0, {"method.lobert.share": 0.5}, state, results={"score": 0.5}))
    work = Work(BASE, tmp_path, SCORE_BYTES, 1, 0.0, False, (), {}, None, "none")
    how = {"retries": 0, "deadline": float("inf"), "last_start": float("inf"), "loggers": []}
    runner = Runner(work, Shares(1, 0.0, 1), ledger, **how, tell=told.append)

    def search() -> None:
        runner.search(Plain(SPACE, 0), Refuses(above=0.0), 5, "none", SPACE)

    if state == "finished":
        search()
        assert "20 samples in a row were skipped" in told[-1]
    else:
        with pytest.raises(UserError, match="20 samples in a row were skipped; the last: it saves"):
            search()


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_an_interrupted_search_goes_on_where_it_was(tmp_path, algorithm):
    def drawn(limit: int, seed: int) -> tuple[Draws, list[dict]]:
        source = make_source(algorithm, SPACE, BASE, SCORE_BYTES, seed)
        draws = Draws(source, Ledger(tmp_path), BASE, Refuses(0.6), limit, print)
        return draws, drain(draws)

    draws, first = drawn(3, seed=0)
    ledger = draws.ledger
    ended = ledger.get(first[0]["number"])
    assert ended is not None
    ended.state, ended.results = "finished", {"score": 0.8, "bytes": 10.0}
    ledger.write(ended)
    _, again = drawn(5, seed=1)
    # The finished one is not drawn again; those in flight are, and then two new ones.
    assert again[:2] == first[1:]
    assert len(again) == 4
    assert len({json.dumps(config["values"]) for config in [*first, *again]}) == 5


def test_optuna_is_asked_only_for_what_the_chain_has():
    axes = {
        "train.lr": ray_tune.loguniform(1e-5, 1e-3),
        "method.lobert.share": ray_tune.uniform(0.2, 0.8),
        "method.theseus.layers": ray_tune.randint(2, 4),
        "method": ray_tune.choice(["lobert", "theseus", "theseus,lobert"]),
    }
    base = recipe_from({"teacher": "t"})
    source = Optuna(make_space(axes, "chains", base), base, SCORE_BYTES, seed=0)
    samples = [source.ask(number) for number in range(12)]
    for number, values in enumerate(samples):
        assert values is not None
        chain = values["method"].split(",")
        assert ("method.lobert.share" in values) == ("lobert" in chain)
        assert ("method.theseus.layers" in values) == ("theseus" in chain)
        source.tell(number, {"score": 0.5, "bytes": 1.0})
    assert len({values["method"] for values in samples if values}) == 3


def test_optuna_learns_from_what_it_is_told():
    axes = {"train.lr": ray_tune.uniform(0.0, 1.0)}
    space = make_space(axes, "line", BASE)
    source = Optuna(space, BASE, parse_objectives("score", METRICS), seed=0)
    drawn = []
    for number in range(40):
        values = source.ask(number)
        assert values is not None
        drawn.append(values["train.lr"])
        source.tell(number, {"score": 1 - abs(drawn[-1] - 0.3)} if number % 7 else None)
    late = sorted(abs(value - 0.3) for value in drawn[20:])
    assert late[len(late) // 2] < 0.15, "half of the later ones are near the best"


def test_asha_remembers_trials_of_before_and_spares_the_front():
    sizes, scores = (100.0, 90.0, 80.0, 70.0), (0.9, 0.8, 0.7, 0.6)
    before = [
        Trial(n, {}, "finished", results={"bytes": size},
              curve=[[25.0, score], [50.0, score], [75.0, score]])
        for n, (size, score) in enumerate(zip(sizes, scores, strict=True))
    ]  # fmt: skip

    def decision(objectives, score: float, size: float) -> str:
        scheduler = make_scheduler("asha", SPACE, objectives)
        remember(scheduler, before)
        stub = SimpleTrial("new")
        scheduler.on_trial_add(None, stub)
        result = {"percent": 25.0, "score": score, "bytes": size}
        return scheduler.on_trial_result(None, stub, result)

    only_score = SCORE_BYTES[:1]
    assert decision(only_score, 0.95, 100.0) == "CONTINUE"
    assert decision(only_score, 0.65, 50.0) == "STOP"
    assert decision(SCORE_BYTES, 0.65, 75.0) == "CONTINUE", "no smaller one is as good"
    assert decision(SCORE_BYTES, 0.65, 85.0) == "STOP", "a smaller one is better"


def rungs_of(curves: dict[str, list[tuple[float, float]]]) -> dict[float, dict[str, float]]:
    """What ASHA's rungs know of trials that report so, and complete."""
    scheduler = make_scheduler("asha", SPACE, SCORE_BYTES[:1])
    for name, curve in curves.items():
        stub = SimpleTrial(name)
        scheduler.on_trial_add(None, stub)
        for percent, score in curve:
            scheduler.on_trial_result(None, stub, {"percent": percent, "score": score})
        scheduler.on_trial_complete(None, stub, {"percent": curve[-1][0], "score": curve[-1][1]})
    return dict(scheduler._brackets[0]._rungs)


def test_asha_compares_no_late_score_with_earlier_ones():
    often, seldom = [(20.0, 0.6), (50.0, 0.7), (75.0, 0.8), (100.0, 0.9)], [(60.0, 0.7)]
    rungs = rungs_of(
        {"often": often, "seldom": [*seldom, (80.0, 0.8), (100.0, 0.9)], "at its end": often[-1:]}
    )
    assert rungs == {15: {"often": 0.6}, 45: {"often": 0.7, "seldom": 0.7}}


def test_asha_remembers_what_trials_of_before_had_spent_on_the_way():
    """Not what they had spent at their ends, by which every trial that runs would be cheaper."""
    objectives = parse_objectives("score,seconds", METRICS)
    before = [
        Trial(n, {}, "finished", results={"seconds": 100.0}, curve=[[25.0, 0.9], [100.0, 0.9]],
              points=[{"seconds": 20.0 + n}, {"seconds": 100.0}])
        for n in range(4)
    ]  # fmt: skip
    scheduler = make_scheduler("asha", SPACE, objectives)
    remember(scheduler, before)
    for seconds, decision in ((50.0, "STOP"), (10.0, "CONTINUE")):
        stub = SimpleTrial(f"of {seconds}")
        scheduler.on_trial_add(None, stub)
        result = {"percent": 25.0, "score": 0.6, "seconds": seconds}
        assert scheduler.on_trial_result(None, stub, result) == decision


def test_median_stopping_knows_no_score_of_a_failed_trial():
    scheduler = make_scheduler("median", SPACE, SCORE_BYTES[:1])
    remember(
        scheduler, [Trial(n, {}, "finished", curve=[[20.0, 0.8], [50.0, 0.8]]) for n in range(3)]
    )
    failed, poor, good = (SimpleTrial(name) for name in ("failed", "poor", "good"))
    scheduler.on_trial_result(None, failed, {"failed": "why"})
    scheduler.on_trial_complete(None, failed, {"failed": "why"})
    assert scheduler.on_trial_result(None, poor, {"percent": 0.0, "score": 0.9}) == "CONTINUE"
    assert scheduler.on_trial_result(None, poor, {"percent": 30.0, "score": 0.7}) == "STOP"
    assert scheduler.on_trial_result(None, good, {"percent": 30.0, "score": 0.9}) == "CONTINUE"


def test_median_stopping_lives_with_trials_that_went_on_after_it_would_stop_them():
    curves = [[[20.0, 0.8], [50.0, 0.8]], [[20.0, 0.8]], [[20.0, 0.8]], [[20.0, 0.1], [50.0, 0.2]]]
    scheduler = make_scheduler("median", SPACE, SCORE_BYTES)
    remember(
        scheduler,
        [Trial(n, {}, "finished", results={"bytes": 9.0}, curve=c) for n, c in enumerate(curves)],
    )
    small = SimpleTrial("small")
    for percent in (30.0, 40.0, 50.0):
        result = {"percent": percent, "score": 0.3, "bytes": 1.0}
        assert scheduler.on_trial_result(None, small, result) == "CONTINUE", "spared each time"


def test_a_population_leaves_finished_trials_alone():
    scheduler = make_scheduler("pbt", SPACE, SCORE_BYTES)
    ended = SimpleTrial("ended")  # Ray's rule would look it up, and does not know it
    assert scheduler.on_trial_result(None, ended, {"percent": 100.0, "score": 0}) == "CONTINUE"
    with pytest.raises(KeyError):
        scheduler.on_trial_result(None, ended, {"percent": 99.0, "score": 0})


@pytest.fixture
def ctrl_c():
    """Ctrl-C, as a terminal's foreground process hears it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_asks_and_the_second_does_not_wait(ctrl_c):
    said = []

    def listen(times: int) -> None:
        ending = Ending(float("inf"))
        with ending.listening():
            said.append(ending.stop_all())
            for _ in range(times):
                ctrl_c()
                said.append(ending.stop_all())

    listen(0)
    assert said == [False]
    with pytest.raises(KeyboardInterrupt):
        listen(1)
    assert said == [False, False, True]
    with pytest.raises(KeyboardInterrupt):
        listen(2)
    assert said == [False, False, True, False, True], "the second was not waited for"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Ending(time.time() - 1).stop_all()


# -- the ledger ------------------------------------------------------------------------------------


def test_the_ledger_reads_what_it_wrote(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write(Trial(2, {"a": 1}, "failed", "why"))
    ledger.write(Trial(1, {"a": [1, None]}, seed=None, curve=[[0.0, 0.5]]))
    ledger.write(Trial(1, {"a": 2}, "finished", seed=43))
    again = Ledger(tmp_path)
    assert [t.number for t in again.trials] == [1, 2]
    assert again.get(1) == ledger.get(1)
    assert [t.seed for t in again.seeds_of(1)] == [43]
    assert again.reopen_failed() == 1
    assert [t.state for t in Ledger(tmp_path).trials] == ["running", "running"]
    (tmp_path / "ledger" / "002.json").write_text("{")
    with pytest.raises(UserError, match=r"002\.json is damaged"):
        Ledger(tmp_path)


def tunes(number: int, **keys) -> SimpleNamespace:
    """As much of Tune's trial as the scribe looks at."""
    config = {"number": number, "population": None, "seed": None, "values": {}}
    return SimpleNamespace(config=config, trial_id=str(number), **keys)


@pytest.mark.parametrize(("deadline", "left"), [(float("inf"), ["002"]), (0.0, ["000", "002"])])
def test_a_stopped_trial_leaves_no_checkpoints(tmp_path, deadline, left):
    """Nor one of before; what the search's deadline cuts short goes on another time."""
    ledger = Ledger(tmp_path)
    for number, state in enumerate(("running", "stopped", "failed")):
        ledger.write(Trial(number, {}, state))
        (run_folder(tmp_path, number) / "checkpoints" / "phase0-step0000008").mkdir(parents=True)
    scribe = Scribe(ledger, 3, 1.0, 0.0, lambda trial: None, lambda text: None, deadline)
    scribe.on_trial_complete(0, [], tunes(0))
    ledger.remove_checkpoints()  # as every start does
    assert sorted(p.parent.name for p in tmp_path.glob("trials/*/checkpoints")) == left


def test_core_seconds_are_of_the_cores_that_a_trial_held_then(tmp_path, monkeypatch):
    """A search that goes on may share the machine out otherwise."""
    ledger = Ledger(tmp_path)
    ledger.write(Trial(0, {}, seconds=10.0, cores=4))
    file = tmp_path / "ledger" / "000.json"
    held = json.loads(file.read_text())
    del held["core_seconds"]  # as an earlier version wrote it
    file.write_text(json.dumps(held))
    ledger = Ledger(tmp_path)
    scribe = Scribe(ledger, 1, 1.0, 0.0, lambda trial: None, lambda text: None, float("inf"))
    now = [100.0]
    monkeypatch.setattr("raybert.tuning.time.time", lambda: now[0])
    scribe.on_trial_start(0, [], tunes(0))
    now[0] += 5
    scribe.on_trial_result(0, [], tunes(0), {"percent": 50.0, "score": 0.5})
    (trial,) = Ledger(tmp_path).trials
    assert (trial.seconds, trial.cores, trial.core_seconds) == (15.0, 1.0, 45.0)


def test_the_time_of_what_crashed_is_counted(tmp_path, monkeypatch):
    nobody, silent = (lambda trial: None), (lambda text: None)
    scribe = Scribe(Ledger(tmp_path), 1, 2.0, 0.5, nobody, silent, float("inf"))
    now = [100.0]
    monkeypatch.setattr("raybert.tuning.time.time", lambda: now[0])
    for again in (scribe.on_trial_recover, scribe.on_trial_error):
        scribe.on_trial_start(0, [], tunes(0))
        now[0] += 5
        again(0, [], tunes(0, get_error=lambda: None))
        now[0] += 60  # it waits for its turn
    (trial,) = Ledger(tmp_path).trials
    assert (trial.state, trial.seconds, trial.core_seconds) == ("failed", 10.0, 20.0)
    assert trial.gpu_seconds == 5.0


def test_the_time_of_a_search_is_counted_over_its_starts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("raybert.ledger.time.monotonic", lambda: now[0])

    def start(*parts: tuple[str, float]) -> dict[str, float]:
        ledger = Ledger(tmp_path)
        for what, seconds in parts:
            now[0] += seconds
            ledger.spend(what)
        return Ledger(tmp_path).spent

    assert start(("teacher", 60.0), ("trials", 5.0), ("trials", 5.0))["trials"] == 10.0
    now[0] += 1000  # it lay there, killed
    assert start(("trials", 20.0)) == {"teacher": 60.0, "trials": 30.0}
    (tmp_path / "ledger" / "spent.json").unlink()
    Ledger(tmp_path).write(Trial(0, {}))
    assert start(("trials", 20.0)) == {}, "one that an earlier version began is not told in part"


@pytest.mark.parametrize(
    ("axis", "least", "most"),
    [
        (ray_tune.uniform(0.5, 2.5), 0.5, 2.5),
        (ray_tune.randint(2, 9), 2, 8),
        (ray_tune.lograndint(2, 9), 2, 8),
        (ray_tune.qrandint(2, 8, 2), 2, 8),
    ],
)
def test_a_population_stays_inside_its_space(axis, least, most):
    explored = make_scheduler("pbt", Space("mine", {"kd.x": axis}), SCORE_BYTES[:1])
    inside = explored._custom_explore_fn
    found = [inside({"values": {"kd.x": value}})["values"]["kd.x"] for value in (-100, 100)]
    assert found == [least, most]


# -- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "least"), [("0.05", 0.85), (".1", 0.8), ("25%", 0.8), ("0", 0.9), ("12.5 %", 0.85)]
)
def test_a_loss_is_points_or_a_share_of_what_was_learned(text, least):
    assert parse_loss(text).least(0.9, 0.5) == pytest.approx(least)


def test_a_loss_may_be_a_number():
    assert parse_loss(0.05) == parse_loss("0.05")


@pytest.mark.parametrize(("teacher", "student"), [(0.85, 0.84), (0.9, 0.89), (0.86, 0.85)])
def test_a_student_at_the_edge_of_the_loss_is_within_it(teacher, student):
    """Metrics come in float32, in which a hundredth less is not always that."""
    least = parse_loss("0.01").least(float(np.float32(teacher)), 0.5)
    assert float(np.float32(student)) >= least > float(np.float32(student - 1e-6))


@pytest.mark.parametrize("text", ["", "five", "-1", "1%%", "2", "120%"])
def test_losses_that_mean_nothing_are_refused(text):
    with pytest.raises(UserError, match="loss"):
        parse_loss(text)


def test_the_smallest_whose_mean_is_within_the_loss_wins():
    lucky = finished(0, [0.89, 0.70, 0.75], 100)  # once within the loss, and not on the mean
    steady = finished(1, [0.88, 0.87, 0.86], 200)
    best = finished(2, [0.90, 0.90, 0.90], 600)
    small = finished(3, [0.60], 50)
    loss = parse_loss("0.05")
    chosen = finalists_of([lucky, steady, best, small], SCORE_BYTES, loss, 3)
    assert [entry.trial.number for entry in chosen] == [0, 1, 2]
    alone = finalists_of([steady, best, small], SCORE_BYTES, loss, 1)
    assert alone == [choose([steady, best, small], SCORE_BYTES, loss)[0]] == [steady]
    assert choose(chosen, SCORE_BYTES, loss) == (steady, True)
    assert choose([lucky, small], SCORE_BYTES, loss) == (lucky, False)
    once = replace(finished(4, [0.89], 100), failed=True)
    assert choose([once, steady, best], SCORE_BYTES, loss) == (steady, True)
    assert rule([once, steady, best], SCORE_BYTES, loss).endswith(
        "a seed failed or cannot be read: 004."
    )
    assert choose([once], SCORE_BYTES, loss) == (once, True), "of all of them one has"
    only_score = parse_objectives("score", METRICS)
    assert choose([lucky, steady, best], only_score, loss) == (best, True)
    assert finalists_of([lucky, steady], SCORE_BYTES, loss, 0) == []


def test_finalists_that_were_cut_short_are_compared_over_the_seeds_that_all_have():
    loss = parse_loss("0.05")
    small = finished(0, [0.88, 0.86], 100)  # there was no time for its third
    large = finished(1, [0.88, 0.87, 0.86], 200)
    assert choose([small, large], SCORE_BYTES, loss) == (small, True)
    said = rule([small, large], SCORE_BYTES, loss)
    assert "over the 2 seeds that all of them have" in said
    # What its own further seeds say is not forgotten.
    lucky, best = finished(2, [0.89, 0.70], 100), finished(3, [0.90], 600)
    assert choose([lucky, best], SCORE_BYTES, loss) == (best, True)
    # And who has some goes before who has none, though it is smaller.
    untried = finished(6, [0.88], 50)
    assert choose([untried, small], SCORE_BYTES, loss) == (small, True)
    said = rule([untried, small], SCORE_BYTES, loss)
    assert "One without further seeds comes after those that have some." in said
    only_score = parse_objectives("score", METRICS)
    late = finished(4, [0.89, 0.89, 0.99], 100)
    assert choose([late, finished(5, [0.90, 0.90], 100)], only_score, loss)[0].trial.number == 5
    assert "trials run again with 3 seeds in all" in rule([large], SCORE_BYTES, loss)


def test_latency_decides_where_it_is_asked_for():
    slow = finished(0, [0.9], 100, milliseconds=9.0)
    fast = finished(1, [0.9], 900, milliseconds=2.0)
    objectives = parse_objectives("score,latency", METRICS)
    assert choose([slow, fast], objectives, parse_loss("0.01")) == (fast, True)
    said = rule([slow, fast], objectives, parse_loss("0.01"))
    assert "the one with the least latency wins" in said
    assert "Finalists are the trials with the least flops among" in said
    alone = rule([slow, fast], objectives, parse_loss("0.01"), chosen=False)
    assert alone.startswith("Of all trials that finished, each of one seed, the one with the least")
    assert "inalists" not in alone


def test_importance_is_found_where_it_is():
    trials = [
        Trial(n, {"x": n / 10, "kind": "ab"[n % 2], "same": 1, "noise": (n * 7) % 10}, "finished",
              curve=[[100.0, n / 10 + (n % 2) * 0.01]])
        for n in range(10)
    ]  # fmt: skip
    found = importance(trials, ["x", "kind", "same", "noise"])
    assert next(iter(found)) == "x"
    assert found["x"] == pytest.approx(1.0)
    assert found["noise"] < 0.1
    assert "same" not in found
    labels = [Trial(n, {"kind": "ab"[n % 2]}, curve=[[1.0, n % 2]]) for n in range(6)]
    assert importance(labels, ["kind"]) == {"kind": pytest.approx(1.0)}


# -- the answer ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A search folder as trials leave it: two finished, one of them with two seeds; others not."""
    out = tmp_path / "search"
    ledger = Ledger(out)
    runs = {
        "trials/000": (0, None, report_of(0.88, 300, milliseconds=4.0)),
        "trials/001": (1, None, report_of(0.9, 800, milliseconds=8.0)),
        "finalists/000-seed43": (0, 43, report_of(0.86, 300, seed=43)),
    }
    for place, (number, seed, report) in runs.items():
        run = out / place
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("{}")
        (run / "metrics.jsonl").write_text("")
        write_run_report(run, report)
        values = {"train.lr": 1e-4 * (number + 1), "kd.normalize": bool(number)}
        values["method.lobert.share"] = 0.3 + number / 4
        trial = Trial(number, values, "finished", seed=seed, seconds=10.0, cores=2)
        trial.core_seconds = 20.0
        trial.curve = [[50.0, 0.7], [100.0, report.student.score]]
        ledger.write(trial)
    ledger.write(Trial(2, {"train.lr": 5e-5}, "skipped", "it saves <nothing>."))
    ledger.write(Trial(3, {"train.lr": 9e-5}, "stopped", curve=[[0.0, 0.5], [25.0, 0.6]]))
    ledger.write(Trial(4, {"train.lr": 1e-3}, "failed", "the loss stopped being a number"))
    return out


def answer(folder: Path, words: str = "score,bytes", **how):
    recipe = BASE.model_copy(update={"out": str(folder)})
    objectives = parse_objectives(words, METRICS)
    return answer_of(recipe, SPACE, objectives, parse_loss("0.05"), 2, Ledger(folder), **how)


def test_the_answer_is_written_for_people_and_programs(folder):
    found = answer(folder)
    write_answer(found)
    assert found.winner.trial.number == 0
    assert found.front == (0, 1)
    assert (found.seconds, found.core_seconds) == (30.0, 60.0)
    assert found.hours == "0.02 core-hours"
    assert replace(found, gpu_seconds=900.0).hours == "0.02 core-hours, 0.25 GPU-hours"
    best = load_recipe(str(folder / "best.yaml"))
    assert best.method[0].model_dump()["share"] == 0.3
    assert best.measure == BASE.measure
    assert best.resources == BASE.resources
    assert best.folder == folder / "best"
    assert {p.name for p in (folder / "front").iterdir()} == {"000.yaml", "001.yaml"}
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [row["state"] for row in rows] == [
        "finished", "finished", "skipped", "stopped", "failed",
    ]  # fmt: skip
    assert rows[0]["seeds"] == "2"
    assert float(rows[0]["mean_score"]) == pytest.approx(0.87)
    assert [row["trial_seconds"] for row in rows] == ["10.0", "10.0", "0.0", "0.0", "0.0"]
    read = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["bytes"] for row in read] == [300.0, 800.0, None, None, None]
    assert read[2]["reason"] == "it saves <nothing>."
    assert "trial 000: accuracy 0.8700 over 2 seed(s)" in summary(found)
    assert "minutes in all" not in summary(found)
    spent = replace(found, spent={"teacher": 90.0, "trials": 150.0})
    assert "4.0 minutes in all (teacher 1.5, trials 2.5)" in summary(spent)
    write_answer(spent)
    page = (folder / "report.html").read_text()
    assert "The search took 4 min 0 s in all: teacher 1 min 30 s, trials 2 min 30 s." in page


def test_a_search_says_what_is_simulated(folder):
    assert "simulated" not in summary(answer(folder))
    for place, found in (
        ("trials/000", {"simulated": True, "simulated_methods": ["lobert"]}),
        ("trials/001", {"simulated_methods": ["q8bert"]}),
    ):
        report = json.loads((folder / place / "report.json").read_text())
        (folder / place / "report.json").write_text(json.dumps({**report, **found}))
    found = answer(folder)
    write_answer(found)
    assert "simulated: in PyTorch on this processor it saves storage and no time" in summary(found)
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [row["simulated"] for row in rows[:3]] == ["simulated", "q8bert simulated", ""]
    page = (folder / "report.html").read_text()
    assert "<strong>The winner is simulated:</strong> in PyTorch" in page
    assert "<small>q8bert simulated</small>" in page


def test_the_page_shows_recipes_under_the_mouse_and_loads_nothing(folder):
    write_answer(answer(folder, "score,bytes,latency"))
    page = (folder / "report.html").read_text()
    assert "the one with the least bytes wins" in page
    assert "<dt>cpu</dt><dd>toy</dd>" in page, "the machine of the winner's report"
    assert "it saves &lt;nothing&gt;." in page
    titles = re.findall(r'<g id="(\w+)-trial-(\d+)"><title>(.*?)</title>', page, re.DOTALL)
    assert {(plot, number) for plot, number, _ in titles} >= {
        ("front0", "0"), ("front0", "1"), ("front1", "0"), ("parallel", "3"), ("curves", "0"),
    }  # fmt: skip
    text = next(text for plot, number, text in titles if (plot, number) == ("front0", "0"))
    assert "method.lobert.share = 0.3" in text
    assert "mean score 0.8700" in text
    assert not re.search(r"<script|<link|src=|https?://(?!www\.w3\.org)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_finalist_that_cannot_be_measured_leaves_the_answer_to_the_others(folder):
    again = folder / "finalists" / "001-seed43"
    shutil.copytree(folder / "trials" / "001", again)
    Ledger(folder).write(Trial(1, {}, "finished", seed=43))
    assert answer(folder).winner.trial.number == 0
    found = answer(folder, failures={"000": "its graph <differs>."}, notes=["the grid is cut"])
    write_answer(found)
    assert found.winner.trial.number == 1
    assert load_recipe(str(folder / "best.yaml")).method[0].model_dump()["share"] == 0.55
    page = (folder / "report.html").read_text()
    assert "Trial 000 could not be measured" in page
    assert "its graph &lt;differs&gt;." in page
    assert "The grid is cut." in page
    assert "trial 000 could not be measured: its graph <differs>." in summary(found)
    none = answer(folder, failures={"000": "why", "001": "why"})
    assert none.winner.trial.number == 0, "none could be, so that all are judged as they are"


def test_where_nothing_could_be_timed_flops_decide(folder):
    for run, size in (("trials/000", 300), ("trials/001", 800), ("finalists/000-seed43", 300)):
        write_run_report(folder / run, report_of(0.9, size))
    found = answer(folder, "score,latency", failures={"000": "why"})
    assert found.front == (0,)
    assert "the least flops" in found.rule
    write_answer(found)
    assert (folder / "front" / "000.yaml").is_file()


def test_a_search_that_could_not_measure_all_says_so_at_the_end(
    toy, teacher, folder, monkeypatch, capsys
):
    """The answer is written, and the command's status is that of a failure."""
    answers: list[Answer] = []

    def counted(*args) -> Answer:
        answers.append(answer_of(*args))
        return answers[-1]

    (folder / "ledger" / "spent.json").write_text("{}")
    monkeypatch.setattr("raybert.search.answer_of", counted)
    failed = {folder / "trials" / "000": "the graph does not compute what the model does."}
    stopped = folder / "trials" / "003" / "checkpoints"
    stopped.mkdir(parents=True)
    monkeypatch.setattr("raybert.search_plan.make_search", lambda *args: search)
    monkeypatch.setattr("raybert.search._save_predictions", lambda *args: None)
    monkeypatch.setattr("raybert.search._teacher_metrics", lambda *args: {})
    monkeypatch.setattr("raybert.search._is_done", lambda *args: True)
    monkeypatch.setattr("raybert.search.side_by_side.measure", lambda *args: failed)
    monkeypatch.setattr("raybert.search.check_place", lambda *args: True)
    search = replace(
        search_of(toy, teacher, folder.parent / "s", loss="5%"),
        recipe=BASE.model_copy(update={"out": str(folder), "teacher": str(teacher / "model")}),
    )
    assert main(["tune", "method=lobert", f"teacher={teacher}"]) == 1
    told = capsys.readouterr().out
    assert "trial 000 could not be measured: the graph does not" in told
    assert re.search(r"minutes in all \(.*measuring ", told), "with the time that measuring took"
    assert len(answers) == 1, "worked out once"
    assert (folder / "best.yaml").is_file()
    assert not stopped.exists(), "an earlier version left them"


def test_who_wins_where_another_failed_is_measured_too(toy, teacher, folder, monkeypatch):
    """Without finalists only the one that would win is: first trial 000."""
    asked: list[list[str]] = []

    def measure(folders: list[Path], *_: object) -> dict[Path, str]:
        asked.append([place.name for place in folders])
        return {place: "why" for place in folders if place.name == "000"}

    monkeypatch.setattr("raybert.search.side_by_side.measure", measure)
    search = replace(
        search_of(toy, teacher, folder.parent / "s", loss="10%", finalists=0),
        recipe=BASE.model_copy(update={"out": str(folder)}),
    )
    found = _measure(search, Ledger(folder), print)
    assert found.failures == {"000": "why"}
    assert found.winner.trial.number == 1
    assert asked == [["000"], ["001"]]


@pytest.mark.parametrize(("points", "done"), [(5, True), (6, False)])
def test_a_grid_that_was_walked_to_its_end_needs_no_room(toy, teacher, folder, points, done):
    """The folder has five trials, one of them skipped; sixteen were asked for."""
    rates = [1e-4 * (n + 1) for n in range(points)]
    axes = {"train.lr": ray_tune.grid_search(rates)}
    search = replace(
        search_of(toy, teacher, folder.parent / "s", axes, loss="0.05", finalists=1, seeds=2),
        recipe=BASE.model_copy(update={"out": str(folder)}),
    )
    assert _is_done(search, Ledger(folder)) == done
    # A finalist's seed, or a trial that was cut short, is left to be run.
    ledger = Ledger(folder)
    assert not _is_done(replace(search, settings=replace(search.settings, seeds=3)), ledger)
    ledger.write(replace(ledger.trials[3], state="running"))
    assert not _is_done(search, ledger)


def test_what_a_trial_took_is_told_beside_the_objective_of_seconds(folder):
    write_answer(answer(folder, "score,seconds"))
    (row, *_) = csv.DictReader((folder / "trials.csv").open())
    assert (row["seconds"], row["trial_seconds"]) == ("1.0", "10.0"), "of training, and of all"


def test_runs_started_from_the_front_outlive_the_next_answer(folder):
    write_answer(answer(folder))
    model = folder / "front" / "000" / "model" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")
    (folder / "front" / "009.yaml").write_text("was on the front once")
    write_answer(answer(folder))
    assert model.read_bytes() == b"weights"
    assert {p.name for p in (folder / "front").iterdir()} == {"000", "000.yaml", "001.yaml"}


def test_the_page_draws_fixed_words_and_numbers_of_another_type(folder):
    space = make_space(
        {
            "method": ray_tune.choice(["lobert", "theseus"]),
            "method.theseus.initialise": "spaced",
            "kd.cls": ray_tune.choice([0, 10]),
        },
        "mixed",
        BASE,
    )
    ledger = Ledger(folder)
    for number, values in enumerate(
        [{"method": "lobert", "kd.cls": 10.0},
         {"method": "theseus", "method.theseus.initialise": "spaced", "kd.cls": 0.0}]
    ):  # fmt: skip
        ledger.write(replace(ledger.trials[number], values=values))
    recipe = BASE.model_copy(update={"out": str(folder)})
    loss = parse_loss("0.05")
    write_answer(answer_of(recipe, space, SCORE_BYTES, loss, 2, Ledger(folder)))
    assert 'id="parallel-trial-1"' in (folder / "report.html").read_text()


def test_a_search_without_a_score_near_the_teacher_says_so(folder):
    again = folder / "finalists" / "001-seed43"
    shutil.copytree(folder / "trials" / "001", again)
    Ledger(folder).write(Trial(1, {}, "finished", seed=43))
    recipe = BASE.model_copy(update={"out": str(folder)})
    found = answer_of(recipe, SPACE, SCORE_BYTES, parse_loss("0"), 1, Ledger(folder))
    write_answer(found)
    assert found.winner.trial.number == 1
    assert found.within
    none = answer_of(recipe, SPACE, SCORE_BYTES, parse_loss("0"), 2, Ledger(folder))
    assert none.winner.trial.number == 1
    assert "no finalist stayed within" not in summary(found)


def test_only_whole_runs_count(folder):
    assert [entry.trial.number for entry in read_finished(Ledger(folder), folder)] == [0, 1]
    Ledger(folder).write(Trial(1, {}, "failed", seed=43))
    assert [entry.failed for entry in read_finished(Ledger(folder), folder)] == [False, True]


def test_a_run_that_cannot_be_read_is_passed_over_and_told(folder):
    (folder / "trials" / "000" / "report.json").unlink()
    found = answer(folder)
    assert found.winner.trial.number == 1
    (note,) = [text for text in found.notes if "trial 000 has finished and counts for" in text]
    assert "has no report.json. To train it again, remove" in note
    assert "ledger/000.json and" in note
    assert "the same command" not in note
    write_answer(found)
    assert "Trial 000 has finished and counts for nothing" in (folder / "report.html").read_text()
    shutil.rmtree(folder / "trials")
    error = str(_nothing(Ledger(folder), folder))
    assert "no trial that has finished can be read (2 finished" in error
    assert "trials/000 is not a run folder" in error


# -- before anything is trained --------------------------------------------------------------------


def search_of(toy, teacher, out, axes=None, **settings):
    keys = {"teacher": str(teacher), "method": ["lobert"]}
    return make_search(toy(out, **keys), axes or AXES, Settings(**settings))


def test_a_search_is_described_before_it_starts(toy, teacher, tmp_path):
    axes = {**AXES, "method.lobert.share": ray_tune.choice([0.5, 0.9999])}
    keys = {"teacher": str(teacher), "method": ["lobert"], "measure": {"batches": [1]}}
    settings = Settings(objectives="score,latency")
    search = make_search(toy(tmp_path / "s", **keys), axes, settings)
    text = describe(search)
    assert "train.lr: loguniform 1e-05 to 0.001" in text
    assert "max score, min latency" in text
    assert text.count("M parameters") == len(search.plans)
    assert search.settings.algorithm == "optuna"
    shares = shares_of(search)
    assert f"shares    {shares.concurrent} trials at once, 1 worker(s) of {shares.cpus}" in text
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("optuna", [True, False])
def test_a_space_of_grids_is_searched_as_one(toy, teacher, tmp_path, monkeypatch, optuna):
    monkeypatch.setattr("raybert.search_plan.has_optuna", lambda: optuna)
    grid = {"kd.cls": ray_tune.grid_search([0.0, 10.0]), "train.lr": 1e-4}
    search = search_of(toy, teacher, tmp_path / "s", axes=grid)
    assert search.settings.algorithm == "grid"
    mixed = search_of(toy, teacher, tmp_path / "s", axes={**AXES, **grid})
    assert mixed.settings.algorithm == "random"
    with pytest.raises(UserError, match="Optuna cannot sample"):
        search_of(toy, teacher, tmp_path / "s", axes=grid, algorithm="optuna")


def test_a_description_leaves_a_clusters_shares_open(toy, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    assert "shares    of the cluster" in describe(search_of(toy, teacher, tmp_path / "s"))


def test_a_share_of_a_gpu_that_nobody_has_is_noted(toy, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("raybert.search_plan.machines", lambda: [(4, 0)])
    assert search_of(toy, teacher, tmp_path / "s").notes == ()
    unused = search_of(toy, teacher, tmp_path / "s", gpu=0.5)
    assert unused.notes == ("--gpu 0.5 has no effect: trials run on CPUs here",)
    monkeypatch.setattr("raybert.search_plan.machines", lambda: [(4, 2)])
    monkeypatch.setattr("raybert.checks.own_cores", lambda: 4)
    assert search_of(toy, teacher, tmp_path / "s", gpu=0.5).notes == ()
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"], workers=2)
    (note,) = make_search(recipe, AXES, Settings(gpu=0.5)).notes
    assert note == "--gpu 0.5 has no effect: each of 2 workers has a whole one"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"algorithm": "hyperband"}, "no algorithm 'hyperband'"),
        ({"scheduler": "bohb"}, "no scheduler 'bohb'"),
        ({"trials": 0}, "trials is 0; give 1 at least"),
        ({"trials": "8"}, "trials is '8'; give a whole number"),
        ({"seeds": None}, "seeds is None; give a whole number"),
        ({"concurrent": 0}, "concurrent is 0; give 1 at least"),
        ({"retries": -1}, "retries is -1; give 0 at least"),
        ({"loss": "much"}, "loss 'much'"),
        ({"objectives": "speed"}, "no report has an objective 'speed'"),
        ({"minutes": -1.0}, "no time to train"),
        ({"minutes": "5"}, "minutes is '5'; give a number"),
        ({"minutes": float("nan")}, "nan minutes leave no time to train"),
        ({"minutes": 5.0, "scheduler": "pbt"}, "Leave --minutes out"),
        ({"loggers": ("tensorbored",)}, "no logger 'tensorbored'"),
        ({"loggers": "tensorbored"}, "no logger 'tensorbored'"),
        ({"algorithm": "grid"}, "has no grid"),
        ({"objectives": "score,latency"}, r"measure\.batches is empty"),
        ({"objectives": "score,min:onnx.bytes"}, "tells no trial from another"),
        ({"objectives": "score,min:seed"}, "tells no trial from another"),
        ({"scheduler": "pbt"}, "lobert settles its parameters"),
        (
            {"objectives": "score,min:student.bytes.total", "scheduler": "asha"},
            "known only when a trial has ended, so that scheduler asha would stop",
        ),
        ({"gpu": 2.0}, "share of a GPU is 2"),
        ({"gpu": 0.0}, "share of a GPU is 0"),
        ({"trials": 999, "concurrent": 999}, "999 trials at once .* do not fit"),
        ({"loggers": ("mlflow",)}, r"mlflow is not installed: pip install \"raybert\[mlflow\]\""),
    ],
)
def test_settings_that_make_no_sense_are_refused(toy, teacher, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        search_of(toy, teacher, tmp_path / "s", **keys)
    assert not (tmp_path / "s").exists()


def test_a_setting_that_there_is_not_is_refused(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"])
    with pytest.raises(UserError, match=r"no setting 'trails' .*'trials'"):
        tune(recipe, AXES, trails=3)


def test_a_space_may_be_given_as_a_path(toy, teacher, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train.lr: {uniform: [0.1, 0.2]}\n")
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"])
    assert list(make_search(recipe, file).space.axes) == ["train.lr"]


def test_rays_client_is_refused(toy, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UserError, match="ray job submit"):
        search_of(toy, teacher, tmp_path / "s")


def test_logging_where_nobody_is_logged_in_is_refused(toy, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("raybert.loggers.find_spec", lambda name: name)

    def setup(self) -> None:
        raise ValueError("No WandB API key found.")

    monkeypatch.setattr("ray.air.integrations.wandb.wandb", object())
    monkeypatch.setattr("ray.air.integrations.wandb.WandbLoggerCallback.setup", setup)
    with pytest.raises(UserError, match="run `wandb login`, or set WANDB_API_KEY"):
        search_of(toy, teacher, tmp_path / "s", loggers=("wandb",))


@pytest.mark.parametrize("changing", [False, True])
def test_parameters_that_change_are_logged_at_the_end(tmp_path, monkeypatch, changing):
    """MLflow takes no second value of one; Ray's callback logs them at every start."""
    monkeypatch.setattr("raybert.loggers.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    (callback,) = make_loggers(("mlflow",), tmp_path, changing)
    assert callback.log_params_on_trial_end == changing


def test_a_search_that_stops_ends_the_runs_of_its_loggers(tmp_path, monkeypatch):
    """Ray tells loggers of no trial that is stopped: MLflow's went on for ever, and Weights &
    Biases was waited for half an hour."""
    monkeypatch.setattr("raybert.loggers.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    (callback,) = make_loggers(("mlflow",), tmp_path)
    ended: list[tuple[str, str]] = []
    callback.tags, callback._trial_runs = {}, {}
    callback.mlflow_util = SimpleNamespace(
        start_run=lambda tags, run_name: SimpleNamespace(info=SimpleNamespace(run_id=run_name)),
        log_params=lambda **_: None,
        end_run=lambda run_id, status: ended.append((run_id, status)),
    )
    trials = [RunningTrial(name) for name in ("done", "cut short")]
    for trial in trials:
        callback.log_trial_start(trial)
    callback.log_trial_end(trials[0])
    callback.on_experiment_end(trials)
    callback.on_experiment_end(trials)
    assert ended == [("done", "FINISHED"), ("cut short", "FAILED")]


def test_what_does_not_fit_a_cluster_is_told_before_the_teacher_is_trained(
    toy, tmp_path, monkeypatch
):
    trained: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    monkeypatch.setattr("raybert.search.ray_up", contextlib.nullcontext)
    monkeypatch.setattr("raybert.search.finetune", lambda recipe, tell: trained.append(recipe.out))
    monkeypatch.setattr("raybert.search_plan.machines", lambda: [(4, 0)])
    recipe = toy(tmp_path / "s", method=["lobert"])
    search = make_search(recipe, AXES, Settings(concurrent=5))  # which knows no cluster yet
    with pytest.raises(UserError, match=r"5 trials at once .* at most --concurrent 4"):
        run_search(search, tell=trained.append)
    assert trained == []


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({"algorithm": "grid", "trials": 5}, ["6 points, of which the first 5 .*--trials 6 tries"]),
        ({"algorithm": "random", "trials": 2}, ["3 points, of which the first 2"]),
        ({"algorithm": "grid", "trials": 6}, []),
    ],
)
def test_a_grid_that_is_cut_says_so_before_it_starts(toy, teacher, tmp_path, settings, noted):
    axes = {
        "train.lr": ray_tune.grid_search([1e-4, 2e-4, 3e-4]),
        "kd.cls": ray_tune.choice([0.0, 1.0]),
    }
    search = search_of(toy, teacher, tmp_path / "s", axes, **settings)
    assert len(search.notes) == len(noted)
    for text, pattern in zip(search.notes, noted, strict=True):
        assert re.search(pattern, text)
        assert f"note      {text}" in describe(search)


def test_points_of_a_grid_that_are_one_recipe_count_once(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "s", teacher=str(teacher))
    settings = {"algorithm": "grid", "objectives": "score", "finalists": 0}
    assert make_search(recipe, CHAINS, Settings(**settings, trials=5)).notes == ()
    (note,) = make_search(recipe, CHAINS, Settings(**settings, trials=4)).notes
    assert "the grid has 5 points" in note


@pytest.mark.parametrize(
    ("scheduler", "train", "notes"),
    [
        ("asha", {"epochs": 1}, 1),
        ("median", {"epochs": 2, "eval_every": 999}, 1),
        ("asha", {"epochs": 1, "eval_every": 2}, 0),
        ("asha", {"epochs": 20, "eval_every": 10}, 0),
        ("asha", {"epochs": 2}, 0),
        ("none", {"epochs": 1}, 0),
    ],
)
def test_early_stopping_that_can_stop_nothing_says_so(
    toy, teacher, tmp_path, scheduler, train, notes
):
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"], train=train)
    search = make_search(recipe, AXES, Settings(scheduler=scheduler))
    assert len(search.notes) == notes
    assert all("can stop nothing" in text for text in search.notes)


def test_a_range_of_workers_is_refused(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["lobert"], workers="1-2")
    with pytest.raises(UserError, match="workers=2 or workers=1, not a range"):
        make_search(recipe, AXES)


def test_a_population_must_be_of_one_structure(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=["theseus"])
    axes = {"method.theseus.layers": ray_tune.choice([1, 2]), "train.lr": 1e-3}
    with pytest.raises(UserError, match="differ in structure or steps"):
        make_search(recipe, axes, Settings(scheduler="pbt"))
    with pytest.raises(UserError, match="chooses the methods"):
        make_search(recipe, {"method": "theseus"}, Settings(scheduler="pbt"))
    assert make_search(recipe, None, Settings(scheduler="pbt")).space.name == "theseus:SCHEDULES"
    chain = toy(tmp_path / "s", teacher=str(teacher), method=["theseus", "q8bert"])
    found = make_search(chain, None, Settings(scheduler="pbt")).space
    assert found.name == "theseus,q8bert:SCHEDULES"
    assert not [key for key in found.axes if key.startswith("method.q8bert")]
    bare = toy(tmp_path / "s", teacher=str(teacher))
    with pytest.raises(UserError, match="give method="):
        make_search(bare, None, Settings(scheduler="pbt"))


@pytest.mark.parametrize(
    ("method", "train", "taken"),
    [
        ({"epochs": 1}, {"epochs": 3}, False),
        ({"epochs": 6}, {"epochs": 1}, True),
        ({"finetune_epochs": 1}, {"epochs": 3, "eval_every": 9999}, True),  # between its phases
        ({"finetune_epochs": 30}, {"epochs": 3, "eval_every": 9999}, False),
        ({}, {"epochs": 3, "eval_every": 9999}, False),
        ({}, {"epochs": 3}, True),
        ({}, {"epochs": 1}, False),
        ({}, {"epochs": 1, "eval_every": 2}, True),
    ],
)
def test_a_population_must_be_looked_at_on_the_way(toy, teacher, tmp_path, method, train, taken):
    methods = [{"name": "theseus", **method}]
    recipe = toy(tmp_path / "s", teacher=str(teacher), method=methods, train=train)
    refused = pytest.raises(UserError, match="none between 20 % of their steps and their end")
    with contextlib.nullcontext() if taken else refused:
        make_search(recipe, None, Settings(scheduler="pbt"))


def test_a_mistake_of_the_recipe_is_not_blamed_on_the_space(toy, tmp_path):
    with pytest.raises(UserError, match=r"^model 'runs/not/there' cannot be read"):
        search_of(toy, "runs/not/there", tmp_path / "s")


def test_a_space_in_which_nothing_runs_is_refused(toy, teacher, tmp_path):
    axes = {"method.lobert.attention_rank": ray_tune.choice([16, 31])}
    with pytest.raises(UserError, match=r"none of 5 samples.*use rank <= 15"):
        search_of(toy, teacher, tmp_path / "s", axes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"train.lr": "x"}},
            r"another space.*There: train\.lr: x; here: .*search\.yaml has .* a file for --space",
        ),
        ({"teacher": "x"}, "another teacher"),
        (
            {"how": {"algorithm": "random"}},
            "another algorithm.*There: algorithm: random; here: .*go on with .* --algorithm",
        ),
        ({"recipe": {}}, "another recipe"),
        ({"rows": "x"}, r"over other rows: `data` changed.*search\.yaml if that makes no"),
        ({}, None),
    ],
)
def test_a_folder_of_another_search_is_left_alone(toy, teacher, tmp_path, changes, message):
    search = search_of(toy, teacher, tmp_path / "s")
    assert not check_place(search)
    search.folder.mkdir()
    held = {**search.identity, **changes}
    (search.folder / "search.yaml").write_text(yaml.safe_dump(held))
    if message is None:
        assert check_place(search)
        more = search_of(toy, teacher, tmp_path / "s", trials=99, minutes=5.0, loss="5%")
        assert check_place(more), "it may go on longer, and be judged otherwise"
        (search.folder / "search.yaml").write_text("space: 2026-13-01")
        with pytest.raises(UserError, match="not readable as YAML"):
            check_place(search)
        (search.folder / "notes.txt").write_text("mine")
        message = "holds notes.txt"
    with pytest.raises(UserError, match=message):
        check_place(search)


def test_a_search_does_not_go_on_over_changed_rows(toy, rows, teacher, tmp_path):
    dev = tmp_path / "dev.csv"
    shutil.copyfile(rows["dev"], dev)

    def searched():
        keys = {"teacher": str(teacher), "method": ["lobert"], "data": {"dev": str(dev)}}
        return make_search(toy(tmp_path / "s", **keys), AXES)

    search = searched()
    search.folder.mkdir()
    (search.folder / "search.yaml").write_text(yaml.safe_dump(search.identity))
    assert check_place(searched())
    dev.write_text(dev.read_text() + "the film was great,bad\n")
    with pytest.raises(UserError, match="over other rows"):
        check_place(searched())


def test_a_search_of_an_earlier_version_is_the_same_search(toy, tmp_path):
    """Its recipe and its teacher's lack keys that have come since."""
    recipe = toy(tmp_path / "s", method=["lobert"])
    search = make_search(recipe, AXES)
    search.folder.mkdir()
    held = json.loads(json.dumps(search.identity))
    del held["rows"], held["recipe"]["kd"]["over_layers"], held["recipe"]["method"][0]["energy"]
    del held["teacher"]["train"]["keep"], held["teacher"]["data"]["metric"]
    (search.folder / "search.yaml").write_text(yaml.safe_dump(held))
    assert check_place(search)
    held["teacher"]["train"]["lr"] = 0.5
    (search.folder / "search.yaml").write_text(yaml.safe_dump(held))
    with pytest.raises(UserError, match=r"another teacher.*'lr': 0\.5"):
        check_place(search)


@pytest.mark.parametrize(
    ("axes", "wanted"),
    [
        ({"train.epochs": ray_tune.choice([0.2, 2.0])}, [False]),
        ({"train.epochs": 0.2}, []),
        ({"kd.cls": ray_tune.choice([0.0, 1.0])}, [True]),
        ({"kd.predictions": "live"}, []),
    ],
)
def test_predictions_are_made_before_where_any_trial_reads_them(
    toy, teacher, tmp_path, monkeypatch, axes, wanted
):
    """Not the first alone, which with this seed makes less than one pass over the rows."""
    made: list[bool] = []
    monkeypatch.setattr("raybert.search.predict_teacher", lambda *_, cls, tell: made.append(cls))
    keys = {"method": ["lobert"], "kd": {"alpha": 0.5}, "train": {"seed": 3}}
    search = make_search(toy(tmp_path / "s", teacher=str(teacher), **keys), axes)
    assert search.samples[0].values.get("train.epochs", 0.2) == 0.2
    _save_predictions(search, print)
    assert made == wanted


def test_trials_elsewhere_are_told_where_the_cache_is(toy, tmp_path, monkeypatch):
    def cache(named: str | None) -> str | None:
        return _as_trials_read_it(toy(tmp_path / "s", data={"cache": named})).data.cache

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYBERT_CACHE", str(tmp_path / "own"))
    assert cache(None) == str(tmp_path / "own")
    assert cache("here") == str(tmp_path / "here")
    assert cache("s3://team/cache") == "s3://team/cache"


def test_the_demo_of_a_search_takes_as_many_workers_as_it_is_told(tmp_path, monkeypatch):
    asked: list[int] = []

    def search(recipe, space, **how):
        asked.append(recipe.workers)
        raise UserError("enough.")

    monkeypatch.setattr("raybert.demo.tune", search)
    words = ["demo", "--tune", "--out", str(tmp_path / "s")]
    assert main([*words, "--workers", "4"]) == main(words) == 2
    assert asked == [4, 1]


def test_the_command_line_checks_and_predicts(rows, encoder, teacher, tmp_path, capsys):
    words = [f"data.{key}={value}" for key, value in rows.items()]
    words += ["task=classification", f"teacher={teacher}", f"out={tmp_path / 'out'}"]
    words += ["method=lobert", "--space", "lobert:PAPER", "--algorithm", "grid", "--dry-run"]
    assert main(["tune", *words]) == 0
    shown = capsys.readouterr().out
    assert "kd.cls: one of 10.0, 100.0, 500.0, 1000.0" in shown
    assert not (tmp_path / "out").exists()
    assert main(["tune", *words, "--loss", "all"]) == 2
    assert "loss 'all'" in capsys.readouterr().err
