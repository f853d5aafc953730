"""The loop: resuming, several workers, distillation, and what goes wrong on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_run import task_files

from raybert.artifact import evaluate_model
from raybert.checkpoint import Position, find_last_good
from raybert.errors import UserError
from raybert.evaluate import evaluate
from raybert.plan import resolve_paths
from raybert.recipe_file import dump_recipe
from raybert.run import compress, finetune
from raybert.train import Trainer

QUIET: dict[str, Any] = {"tell": lambda text: None}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def lines(run: Path, kind: str) -> list[dict]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def start(recipe, command: str = "compress") -> subprocess.Popen:
    """The command line on this recipe, in a process of its own that can be killed."""
    recipe.folder.parent.mkdir(parents=True, exist_ok=True)
    path = recipe.folder.with_suffix(".yaml")
    path.write_text(dump_recipe(recipe))
    return subprocess.Popen(
        [sys.executable, "-m", "raybert", command, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore SIGINT, and their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def through(recipe, command: str = "compress") -> str:
    """The command line on this recipe, to its end; what it printed."""
    process = start(recipe, command)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_fine_tuning_learns_the_task(teacher):
    report = json.loads((teacher / "report.json").read_text())
    assert report["student"]["score"] > report["floor"] + 0.2
    assert report["training"]["steps"] == 36
    assert lines(teacher, "train")[-1]["waited"] < 1.0


LONG: dict[str, Any] = {
    "method": [{"name": "theseus", "finetune_epochs": 1, "schedule": "linear"}],
    "kd": {"alpha": 0.3, "cls": 1.0},
    "train": {"epochs": 10, "save_every": 4, "eval_every": 7},
}
"""Keys of a run that is long enough to be interrupted."""


@pytest.fixture(scope="module")
def whole(toy, teacher, tmp_path_factory) -> Path:
    """Such a run, uninterrupted. It and the others are in processes of their own: sums depend on
    the number of threads, which tests here change."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    through(toy(folder, teacher=str(teacher), **LONG))
    return folder


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_continues_to_the_same_weights(toy, teacher, whole, tmp_path, signal_number):
    recipe = toy(tmp_path / "killed", teacher=str(teacher), **LONG)
    process = start(recipe)
    wait_for(recipe.folder / "checkpoints" / "phase0-step0000008", process)
    process.send_signal(signal_number)
    process.wait(60)
    assert not (recipe.folder / "report.json").exists()
    assert find_last_good(recipe.folder / "checkpoints")[0] is not None
    assert "continuing" in through(recipe)
    assert_same(weights(whole), weights(recipe.folder))
    steps = [(line["phase"], line["step"]) for line in lines(recipe.folder, "train")]
    assert steps == [(line["phase"], line["step"]) for line in lines(whole, "train")]


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    toy, teacher, whole, tmp_path
):
    recipe = toy(tmp_path / "cut", teacher=str(teacher), **LONG)
    process = start(recipe)
    wait_for(recipe.folder / "checkpoints" / "phase0-step0000012", process)
    process.kill()
    process.wait(60)
    newest, _ = find_last_good(recipe.folder / "checkpoints")
    assert newest is not None
    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{newest.name} is damaged" in through(recipe)
    notes = json.loads((recipe.folder / "report.json").read_text())["notes"]
    assert any(newest.name in note for note in notes)
    assert_same(weights(whole), weights(recipe.folder))


def test_a_finished_run_is_not_trained_again(toy, tmp_path):
    recipe = toy(tmp_path / "run", train={"max_steps": 2})
    finetune(recipe, **QUIET)
    before = (tmp_path / "run" / "report.json").stat().st_mtime_ns
    told: list[str] = []
    finetune(recipe, tell=told.append)
    assert (tmp_path / "run" / "report.json").stat().st_mtime_ns == before
    assert any("finished already" in text for text in told)


@pytest.mark.parametrize(
    ("method", "keep", "passes"),
    [
        # The start and two epochs; what LoBERT ends with is what was evaluated last, or best.
        ("lobert", "last", 3),
        ("lobert", "best", 3),
        ("q8bert", "best", 4),  # which makes integers of it first
    ],
)
def test_a_model_that_was_evaluated_is_not_evaluated_again(
    toy, teacher, tmp_path, monkeypatch, method, keep, passes
):
    evaluated: list[int] = []

    def counted(model: Any, data: Any, *how: Any) -> dict[str, float]:
        evaluated.append(1)
        return evaluate(model, data, *how)

    monkeypatch.setattr("raybert.train.evaluate", counted)
    keys = {"method": [method], "train": {"keep": keep, "lr": 1e-2}}
    recipe = resolve_paths(toy(tmp_path / "run", teacher=str(teacher), **keys))
    run = compress(recipe, **QUIET)
    report = json.loads((run / "report.json").read_text())
    assert len(evaluated) == passes + 1, "the teacher is evaluated too"
    assert report["student"]["metrics"] == evaluate_model(run, recipe)["metrics"]
    scores = [line["accuracy"] for line in lines(run, "eval")[1:]]
    if method == "lobert":
        assert report["student"]["score"] == (max(scores) if keep == "best" else scores[-1])


@pytest.mark.parametrize("kind", ["classification", "mlm"])
def test_accumulation_gives_the_losses_of_one_pass(toy, teacher, tmp_path, kind):
    data = {**task_files("mlm", tmp_path), "text": None, "label": None} if kind == "mlm" else {}
    logs = []
    for accumulation in (1, 3):  # 16 rows are 6, 5 and 5, and of masked tokens there are as few
        keys = {"dropout": 0.0, "accumulation": accumulation, "clip": 0.5, "precision": "fp32"}
        recipe = toy(tmp_path / str(accumulation), task=kind, data=data, train=keys)
        logs.append([line["loss"] for line in lines(finetune(recipe, **QUIET), "train")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_layers_of_rows_with_few_masked_words_count_as_much_as_others(toy, tmp_path):
    """However a batch is cut into passes."""
    keys = {"task": "mlm", "data": {**task_files("mlm", tmp_path), "text": None, "label": None}}
    taught = finetune(toy(tmp_path / "teacher", train={"epochs": 1}, **keys), **QUIET)
    keys |= {"teacher": str(taught), "method": ["lobert"], "kd": {"hidden": 1.0}}
    logs = []
    for accumulation in (1, 3):
        train = {"dropout": 0.0, "accumulation": accumulation, "precision": "fp32"}
        run = compress(toy(tmp_path / str(accumulation), train=train, **keys), **QUIET)
        logs.append([line["loss/kd_hidden"] for line in lines(run, "train")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 2])
def test_two_workers_train_like_one(toy, teacher, tmp_path, zero):
    runs = []
    for workers in (1, 2):
        keys = {"dropout": 0.0, "zero": zero if workers == 2 else 0, "precision": "fp32"}
        recipe = toy(
            tmp_path / str(workers),
            teacher=str(teacher),
            method="theseus",
            kd={"alpha": 0.5},
            workers=workers,
            train={"epochs": 1, "batch_size": 15, **keys},  # 8 rows and 7
        )
        runs.append(compress(recipe, **QUIET))
    for key in ("loss", "loss/kd_logits", "replacing_rate"):
        one, two = ([line[key] for line in lines(run, "train")] for run in runs)
        assert one == pytest.approx(two, rel=1e-3), key
    one, two = (json.loads((run / "report.json").read_text()) for run in runs)
    assert one["student"]["metrics"] == pytest.approx(two["student"]["metrics"])
    # Padding depends on which rows share a pass.
    assert one["training"]["tokens"] == pytest.approx(two["training"]["tokens"], rel=0.1)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The two workers that a run has started."""
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in child.name() + " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    return workers


def test_workers_with_whom_epochs_would_have_other_steps_are_refused(toy, tmp_path):
    recipe = toy(tmp_path, workers=6, train={"batch_size": 16, "accumulation": 2})
    run: Any = SimpleNamespace(recipe=recipe, lengths=np.zeros(90))  # the last batch has 10
    run.position = Position(most=4)
    with pytest.raises(UserError, match=r"6\s+steps.* it has 5, .* 12 .* 1 to 5 workers"):
        Trainer._check_workers(run)
    for most in (0, 6, 8):
        run.position = Position(most=most)
        Trainer._check_workers(run)


@pytest.mark.distributed
def test_a_worker_that_dies_is_replaced(toy, tmp_path):
    keys = {"epochs": 12, "save_every": 4, "dropout": 0.0}
    whole = finetune(toy(tmp_path / "whole", train=keys), **QUIET)  # two train like one
    recipe = toy(tmp_path / "hit", workers=2, train=keys)
    process = start(recipe, "finetune")
    wait_for(recipe.folder / "checkpoints" / "phase0-step0000008", process)
    workers_of(process)[1].kill()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert lines(recipe.folder, "train")[-1]["step"] == 72
    one, two = (lines(run, "eval")[-1] for run in (whole, recipe.folder))
    assert one["accuracy"] == pytest.approx(two["accuracy"], abs=0.05)


@pytest.mark.distributed
@pytest.mark.long
def test_a_worker_that_hangs_is_replaced(toy, tmp_path):
    keys: dict[str, Any] = {"workers": 2, "resources": {"timeout": 0.25, "cpus": 1}}
    keys["train"] = {"epochs": 12, "save_every": 4, "zero": 1}
    through(toy(tmp_path / "whole", **keys), "finetune")
    recipe = toy(tmp_path / "hung", **keys)
    process = start(recipe, "finetune")
    wait_for(recipe.folder / "checkpoints" / "phase0-step0000008", process)
    hung = workers_of(process)[1]
    hung.suspend()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert not hung.is_running()
    assert_same(weights(tmp_path / "whole"), weights(recipe.folder))


@pytest.mark.distributed
@pytest.mark.long
def test_one_worker_without_zero_continues_what_two_began_with_it(toy, tmp_path):
    keys = {"epochs": 12, "save_every": 4, "dropout": 0.0, "precision": "fp32", "keep": "last"}
    whole = toy(tmp_path / "whole", train=keys)
    through(whole, "finetune")
    recipe = toy(tmp_path / "moved", workers=2, train={**keys, "zero": 2})
    process = start(recipe, "finetune")
    wait_for(recipe.folder / "checkpoints" / "phase0-step0000008", process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "the same command continues" in output
    assert not (recipe.folder / "report.json").exists()
    assert "continuing" in through(toy(recipe.folder, train=keys), "finetune")
    one, two = (lines(run.folder, "train") for run in (whole, recipe))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert one[-1]["loss"] == pytest.approx(two[-1]["loss"], rel=0.05)
    moved = weights(recipe.folder)
    for name, tensor in weights(whole.folder).items():
        torch.testing.assert_close(moved[name], tensor, rtol=0.01, atol=1e-3)


@pytest.mark.distributed
def test_zero_3_fine_tunes(toy, tmp_path):
    recipe = toy(tmp_path / "run", workers=2, train={"epochs": 2, "zero": 3, "lr": 3e-3})
    finetune(recipe, **QUIET)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    last = lines(tmp_path / "run", "eval")
    assert report["student"]["score"] == pytest.approx(max(line["accuracy"] for line in last))
    assert all(tensor.numel() for tensor in weights(tmp_path / "run").values())


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(toy, tmp_path):
    recipe = toy(tmp_path / "run", train={"lr": 1e30, "clip": 0.0, "warmup": 0.9, "save_every": 1})
    with pytest.raises(UserError, match=r"stopped being a number at step \d+") as error:
        finetune(recipe, **QUIET)
    assert "last good checkpoint is kept" in str(error.value)
    kept, passed_over = find_last_good(tmp_path / "run" / "checkpoints")
    assert kept is not None
    assert not passed_over
    for tensor in load_file(kept / "model.safetensors").values():
        assert torch.isfinite(tensor).all()


def test_a_full_disk_names_itself_and_leaves_the_last_checkpoint(toy, tmp_path):
    recipe = toy(tmp_path / "run", train={"epochs": 3, "save_every": 6})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    # Files may grow to half of an optimiser's state: writing one fails as on a full disk.
    code = (
        "import resource, sys, raybert.checkpoint as c, raybert.cli as cli\n"
        "whole, calls = c._write, []\n"
        "def write(*a):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))\n"
        "    whole(*a)\n"
        "c._write = write\n"
        f"sys.exit(cli.main(['finetune', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert "phase0-step0000006" in done.stderr
    assert "Traceback" not in done.stderr
    kept, _ = find_last_good(tmp_path / "run" / "checkpoints")
    assert kept is not None
    assert kept.name == "phase0-step0000006"
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))
    finetune(recipe, **QUIET)
    assert (tmp_path / "run" / "report.json").is_file()


@pytest.mark.parametrize(
    ("kd", "terms"),
    [
        ({"alpha": 0.5}, {"kd_logits"}),
        ({"alpha": 0.5, "form": "soft_ce"}, {"kd_logits"}),
        ({"cls": 10.0, "normalize": False}, {"kd_cls"}),
        ({"hidden": 1.0}, {"kd_hidden"}),
        ({"attention": 1000.0}, {"kd_attention"}),
    ],
)
def test_each_distillation_term_is_there_and_falls(toy, teacher, tmp_path, kd, terms):
    recipe = toy(
        tmp_path / "run",
        teacher=str(teacher),
        method=[{"name": "theseus", "replacing_rate": 1.0}],
        kd=kd,
        train={"epochs": 10},
    )
    logged = lines(compress(recipe, **QUIET), "train")
    for term in terms:
        values = [line[f"loss/{term}"] for line in logged]
        assert 0 < values[-1] < values[0], term


def test_rates_of_zero_leave_weights_as_they_were(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "run", teacher=str(teacher), method="theseus")
    student, taught = weights(compress(recipe, **QUIET)), weights(teacher)
    for name, tensor in student.items():
        if ".layer." not in name:
            assert torch.equal(tensor, taught[name]), name
    assert not torch.equal(
        student["bert.encoder.layer.0.output.dense.weight"],
        taught["bert.encoder.layer.0.output.dense.weight"],
    )


def test_a_group_of_one_is_left_before_the_interpreter_ends():
    code = (
        "import atexit, torch, torch.distributed as dist\n"
        "atexit.register(lambda: print('still there:', dist.is_initialized()))\n"
        "from raybert.engine import alone, init_distributed\n"
        "with alone():\n"
        "    init_distributed(torch.device('cpu'), 1)\n"
        "print('there:', dist.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["there: True", "still there: False"]
