"""A job on several hosts, and hosts that are lost under it; each host is a set of namespaces."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hosts
import pytest
import torch
from conftest import make_tokenizer, write_rows
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from raybert.recipe_file import dump_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.long]


@pytest.fixture
def shared(tmp_path, teacher) -> Path:
    """A folder that will be /mnt/raybert on every host: rows and a teacher are in it."""
    if why := hosts.missing():
        pytest.skip(why)
    folder = tmp_path / "shared"
    shutil.copytree(teacher / "model", folder / "teacher")
    write_rows(folder / "train.csv", 90, seed=1)
    write_rows(folder / "dev.csv", 41, seed=2)
    return folder


def recipe_on(shared: Path, toy: Any, **keys: Any) -> Path:
    """The file of a recipe of two workers, with the hosts' paths in it."""
    data = {"train": str(shared / "train.csv"), "dev": str(shared / "dev.csv"), "cache": None}
    recipe = toy(
        shared / "runs" / "job",
        teacher=str(shared / "teacher"),
        data=data,
        kd={"alpha": 0.5, "predictions": "live"},
        workers=2,
        resources={"cpus": 1, "wait": 5, "max_failures": 5},
        **keys,
    )
    path = shared.parent / "recipe.yaml"
    path.write_text(dump_recipe(recipe).replace(str(shared), str(hosts.STORAGE)))
    return path


def on_hosts(what: str, shared: Path, recipe: Path, start: str = "ray-start") -> None:
    words = [what, "--shared", str(shared), "--recipe", str(recipe), "--start", start]
    done = subprocess.run([sys.executable, hosts.__file__, *words], timeout=1500)
    assert done.returncode == 0


@pytest.mark.parametrize("start", ["ray-start", "ray-up"])
def test_two_hosts_distil_a_job_submitted_from_outside(shared, toy, start):
    if start == "ray-up":
        lacking = [tool for tool in hosts.FOR_LAUNCHER if not hosts.found(tool)]
        if lacking:
            pytest.skip(f"{', '.join(lacking)} not found")
    recipe = recipe_on(shared, toy, method="theseus", train={"zero": 2})
    on_hosts("job", shared, recipe, start)
    run = shared / "runs" / "job"
    report = json.loads((run / "report.json").read_text())
    assert report["workers"] == 2
    assert report["student"]["score"] > report["floor"]
    assert (run / "model" / "model.safetensors").is_file()


def slow_student(shared: Path) -> str:
    # Large embeddings, so that writing a checkpoint takes long enough to be interrupted.
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    student = BertModel(BertConfig(vocab_size=250_000, num_hidden_layers=1, **sizes))
    student.save_pretrained(shared / "student")
    make_tokenizer().save_pretrained(shared / "student")
    return str(shared / "student")


def test_lost_hosts_change_nothing(shared, toy):
    train = {"epochs": 20, "save_every": 5, "zero": 2}
    recipe = recipe_on(shared, toy, model=slow_student(shared), train=train)
    on_hosts("faults", shared, recipe)
    whole, hit = (shared / "runs" / name for name in ("whole", "hit"))
    one, two = (load_file(run / "model" / "model.safetensors") for run in (whole, hit))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    one, two = (json.loads((run / "report.json").read_text()) for run in (whole, hit))
    assert one["student"]["metrics"] == two["student"]["metrics"]
    assert one["training"]["steps"] == two["training"]["steps"] == 120


def test_a_range_of_workers_shrinks_and_grows(shared, toy):
    train = {"epochs": 60, "save_every": 5, "zero": 2}
    on_hosts("elastic", shared, recipe_on(shared, toy, model=slow_student(shared), train=train))
    report = json.loads((shared / "runs" / "elastic" / "report.json").read_text())
    assert report["training"]["steps"] == 360
    for change in ("1 worker(s) from step", "2 worker(s) from step"):
        assert any(note.startswith(change) for note in report["notes"]), report["notes"]
    assert report["student"]["score"] > report["floor"]
