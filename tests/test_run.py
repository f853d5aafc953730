"""Whole runs: every kind of task, every family, and what ends up in the run folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BAD, GOOD, OTHER, make_tokenizer, toy_encoder, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import raybert
from raybert.artifact import evaluate_model
from raybert.errors import UserError
from raybert.groups import group_runs
from raybert.plan import make_plan, resolve_paths
from raybert.recipe_file import dump_recipe, load_recipe, recipe_from
from raybert.results import read_run
from raybert.run import compress, finetune

QUIET: dict[str, Any] = {"tell": lambda text: None}


def sentence(draw: random.Random, words: int = 6) -> str:
    return " ".join(draw.choice((*OTHER, *GOOD, *BAD)) for _ in range(words))


def qa_file(path: Path, count: int, no_answer: bool) -> None:
    draw = random.Random(count)
    questions = []
    for number in range(count):
        answer = draw.choice(GOOD)
        context = f"{sentence(draw)} {answer} {sentence(draw)}"
        entry = {"id": f"{path.stem}-{number}", "question": sentence(draw, 3)}
        if no_answer and number % 3 == 0:
            entry |= {"answers": [], "is_impossible": True}
        else:
            place = {"text": answer, "answer_start": context.index(f" {answer} ") + 1}
            entry |= {"answers": [place], "is_impossible": False}
        questions.append({"context": context, "qas": [entry]})
    path.write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": questions}]})
    )


def task_files(kind: str, folder: Path) -> dict[str, str]:
    """Rows of one kind of task; the recipe's ``data`` keys for them."""
    draw = random.Random(0)
    files = {split: folder / f"{split}.jsonl" for split in ("train", "dev")}
    if kind in ("squad", "squad2"):
        files = {split: folder / f"{split}.json" for split in files}
    elif kind == "mlm":
        files = {split: folder / f"{split}.txt" for split in files}
    for split, path in files.items():
        count = {"train": 32, "dev": 17}[split]
        if kind in ("squad", "squad2"):
            qa_file(path, count, kind == "squad2")
        elif kind == "mlm":
            path.write_text("\n".join(sentence(draw, 20) for _ in range(count)))
        else:
            rows = []
            for _ in range(count):
                row = {"one": sentence(draw), "two": sentence(draw)}
                score = sum(word in GOOD for word in row["one"].split())
                row["y"] = {
                    "regression": score + 0.5,
                    "multilabel": [w for w in ("good", "bad") if w in row["one"]],
                    "classification": "many" if score > 1 else "few",
                }[kind]
                rows.append(json.dumps(row))
            path.write_text("\n".join(rows))
    keys = {split: str(path) for split, path in files.items()}
    if kind in ("classification", "regression", "multilabel"):
        keys |= {"text": "one", "label": "y"}
    if kind == "classification":
        keys["text_pair"] = "two"
    return keys


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("classification", {"accuracy", "f1"}),
        ("regression", {"pearson", "spearman"}),
        ("multilabel", {"accuracy", "f1"}),
        ("squad", {"em", "f1"}),
        ("squad2", {"em", "f1", "best_f1", "best_f1_threshold"}),
        ("mlm", {"masked_accuracy", "perplexity"}),
    ],
)
def test_every_kind_of_task_is_fine_tuned_distilled_and_compressed(
    encoder, tmp_path, kind, metrics
):
    data = {**task_files(kind, tmp_path), "max_length": 32, "stride": 8}
    data["cache"] = str(tmp_path / "cache")
    train = {"epochs": 2, "lr": 1e-3, "batch_size": 16}
    base = {"task": kind, "data": data, "train": train, "measure": {"batches": []}}
    teacher = finetune(
        recipe_from({**base, "model": str(encoder), "out": str(tmp_path / "teacher")}), **QUIET
    )
    kd = {"alpha": 0.5, "cls": 1.0, "hidden": 1.0}
    keys = {"teacher": str(teacher), "method": "theseus", "kd": kd, "out": str(tmp_path / "small")}
    recipe = recipe_from({**base, **keys})
    report = json.loads((compress(recipe, **QUIET) / "report.json").read_text())
    assert metrics <= report["student"]["metrics"].keys()
    assert metrics <= report["teacher"]["metrics"].keys()
    assert report["student"]["parameters"]["rest"] < report["teacher"]["parameters"]["rest"]
    again = evaluate_model(tmp_path / "small", recipe)
    assert again["metrics"] == pytest.approx(report["student"]["metrics"])
    log = (tmp_path / "small" / "metrics.jsonl").read_text().splitlines()
    losses = [line for line in map(json.loads, log) if line["kind"] == "train"]
    assert {"loss/task", "loss/kd_logits", "loss/kd_cls", "loss/kd_hidden"} <= losses[-1].keys()


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
@pytest.mark.parametrize("modules", ["layer", "sublayer"])
def test_other_families_are_compressed(toy, tmp_path, family, modules):
    toy_encoder(family).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    recipe = toy(
        tmp_path / "run",
        model=str(tmp_path / "encoder"),
        method=[{"name": "theseus", "modules": modules}],
        kd={"alpha": 0.5, "attention": 1.0},
        train={"epochs": 1},
        finetune={"epochs": 1},
    )
    compress(recipe, **QUIET)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.model_type == family
    assert model.config.num_hidden_layers == 2
    assert (tmp_path / "run" / "teacher" / "model" / "config.json").is_file()


def test_the_run_folder_describes_and_reproduces_itself(toy, teacher, tmp_path):
    recipe = toy(tmp_path / "run", teacher=str(teacher), method="theseus", measure={"batches": [1]})
    folder = compress(recipe, **QUIET)
    names = {path.name for path in folder.iterdir()}
    files = {"recipe.yaml", "metrics.jsonl", "report.json", "report.html", "report.md", "model"}
    assert files <= names
    report = json.loads((folder / "report.json").read_text())
    assert report["speedup"]
    assert report["speedup"][0]["model"] == "student"
    assert not report["simulated"]
    assert report["floor"] == pytest.approx(max(22, 19) / 41, abs=0.1)
    card = (folder / "model" / "README.md").read_text()
    assert "AutoModel" in card
    again = load_recipe(str(folder / "recipe.yaml"), [f"out={tmp_path / 'again'}"])
    other = compress(again, **QUIET)
    batch = make_tokenizer()(["the film was good"], return_tensors="pt")
    first, second = raybert.load(folder), raybert.load(other)
    with torch.no_grad():
        assert torch.equal(first(**batch).logits, second(**batch).logits)


def test_a_model_of_its_own_learns_from_a_teacher_without_a_method(toy, teacher, tmp_path):
    toy_encoder(layers=1).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    recipe = toy(
        tmp_path / "run",
        model=str(tmp_path / "small"),
        teacher=str(teacher),
        kd={"alpha": 0.7, "hidden": 1.0, "layer_map": [4]},
    )
    report = json.loads((compress(recipe, **QUIET) / "report.json").read_text())
    assert report["teacher"]["score"] > report["floor"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_hidden_layers == 1


def test_a_successor_starts_another_task(toy, teacher, tmp_path):
    first = compress(toy(tmp_path / "one", teacher=str(teacher), method="theseus"), **QUIET)
    many = json.loads((first / "model" / "config.json").read_text())
    many["id2label"] = {str(i): f"star {i}" for i in range(3)}  # a head of three labels
    many["label2id"] = {name: int(i) for i, name in many["id2label"].items()}
    (first / "model" / "config.json").write_text(json.dumps(many))
    weights = load_file(first / "model" / "model.safetensors")
    weights["classifier.weight"], weights["classifier.bias"] = torch.zeros(3, 32), torch.zeros(3)
    save_file(weights, first / "model" / "model.safetensors", {"format": "pt"})
    keys = task_files("squad", tmp_path)
    recipe = toy(
        tmp_path / "two",
        model=str(first),
        task="squad",
        data={**keys, "text": None, "label": None, "stride": 8},
    )
    finetune(recipe, **QUIET)
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "two" / "model")
    assert model.config.num_hidden_layers == 2


def test_what_is_trained_on_is_still_called_compressed(toy, teacher, tmp_path):
    keys = {"train": {"max_steps": 1}}
    method = [{"name": "ebert", "epochs": 0}]
    first = compress(toy(tmp_path / "one", teacher=str(teacher), method=method, **keys), **QUIET)
    second = finetune(toy(tmp_path / "two", model=str(first), **keys), **QUIET)
    for folder in (first, second):
        card = (folder / "model" / "README.md").read_text()
        assert "library_name: raybert" in card
        assert "raybert.load(folder)" in card
        report = read_run(folder).report
        said = sum("what is computed depends on the sample" in text for text in report.notes)
        assert (said, report.chain) == (1, "ebert")
        assert not group_runs([read_run(folder)])[0].is_teacher


def test_a_report_that_was_lost_is_written_anew_and_nothing_trained(toy, tmp_path):
    recipe = toy(tmp_path / "run", train={"max_steps": 2})
    file, log = (finetune(recipe, **QUIET) / name for name in ("report.json", "metrics.jsonl"))
    before, trained = json.loads(file.read_text()), log.read_bytes()
    for damaged in ("{", '{"name": "run"}'):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"Remove it and start the run's command again"):
            read_run(file.parent)
    file.unlink()
    finetune(recipe, **QUIET)
    after = json.loads(file.read_text())
    assert (after["student"], after["training"]) == (before["student"], before["training"])
    assert log.read_bytes() == trained


def test_what_starts_in_half_precision_is_predicted_in_float32(toy, tmp_path):
    toy_encoder().bfloat16().save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    recipe = toy(tmp_path / "run", model=str(tmp_path / "encoder"), method="ma_bert")
    plan = make_plan(resolve_paths(recipe))
    float32 = 4 * plan.after["parameters"]["total"]
    assert plan.after["bytes"] == pytest.approx(float32, rel=0.1)
    assert plan.before["bytes"] == pytest.approx(float32 / 2, rel=0.3)


def test_methods_and_fine_tuning_are_not_confused(toy, tmp_path):
    with pytest.raises(UserError, match="raybert compress"):
        finetune(toy(tmp_path / "run", method="theseus"), **QUIET)
    with pytest.raises(UserError, match="nothing to compress with"):
        compress(toy(tmp_path / "run"), **QUIET)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_the_hub_is_learned_from_and_measured(toy, teacher, tmp_path):
    hub = tmp_path / "home" / "hub" / "models--toys--teacher"
    shutil.copytree(teacher / "model", hub / "snapshots" / "0a1b")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0a1b")
    recipe = toy(
        tmp_path / "run",
        teacher="toys/teacher",
        method="theseus",
        kd={"alpha": 0.5},
        train={"max_steps": 2},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    ended = subprocess.run(
        [sys.executable, "-m", "raybert", "compress", str(tmp_path / "recipe.yaml")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        text=True,
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    own = json.loads((teacher / "report.json").read_text())["student"]
    assert report["teacher"]["score"] == pytest.approx(own["score"])
    assert report["teacher"]["bytes"]["weights"] == own["bytes"]["weights"]


def test_a_run_whose_rows_or_teacher_changed_is_not_gone_on_with(toy, teacher, tmp_path):
    write_rows(tmp_path / "train.csv", 60, seed=1)
    shutil.copytree(teacher / "model", tmp_path / "teacher")
    recipe = toy(
        tmp_path / "run",
        teacher=str(tmp_path / "teacher"),
        method="theseus",
        train={"max_steps": 2},
        data={"train": str(tmp_path / "train.csv"), "cache": str(tmp_path / "cache")},
    )
    run = compress(recipe, **QUIET)
    write_rows(tmp_path / "train.csv", 60, seed=2)
    told: list[str] = []
    compress(recipe, tell=told.append)
    assert "is finished already" in told[0]
    assert "the rows of `data` changed since" in told[1]
    held = (run / "inputs.json").read_text()
    for text in ("[]", "{", "{}"):  # of who knows better
        (run / "inputs.json").write_text(text)
        told.clear()
        compress(recipe, tell=told.append)
        assert len(told) == 1
    (run / "inputs.json").write_text(held)
    (run / "report.json").unlink()  # as if it had not finished
    with pytest.raises(UserError, match="the rows of `data` changed since"):
        compress(recipe, **QUIET)
    write_rows(tmp_path / "train.csv", 60, seed=1)
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["classifier.bias"] += 1.0
    save_file(weights, tmp_path / "teacher" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the model and the teacher changed since"):
        compress(recipe, **QUIET)
    shutil.copytree(teacher / "model", tmp_path / "teacher", dirs_exist_ok=True)
    compress(recipe, **QUIET)


def test_a_run_of_an_earlier_version_is_the_same_run(toy, tmp_path):
    keys = {"train": {"max_steps": 2}, "measure": {"batches": []}}
    run = finetune(toy(tmp_path / "run", **keys), **QUIET)
    held = yaml.safe_load((run / "recipe.yaml").read_text())
    del held["train"]["dropout"], held["data"]["separator"]  # as if they had come since
    held["data"]["cache"] = "elsewhere"  # which says nothing of the rows
    (run / "recipe.yaml").write_text(yaml.safe_dump(held))
    told: list[str] = []
    finetune(toy(tmp_path / "run", **keys), tell=told.append)
    assert "is finished already" in told[0]
    held["train"]["seed"] = 5
    (run / "recipe.yaml").write_text(yaml.safe_dump(held))
    with pytest.raises(UserError, match=r"train\.seed is 5 there"):
        finetune(toy(tmp_path / "run", **keys), **QUIET)
