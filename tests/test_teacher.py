"""Saved predictions: they equal a live teacher's, and nothing stale, partial or foreign is used."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from conftest import make_tokenizer, toy_encoder, write_rows
from safetensors.torch import load_file, save_file
from test_run import task_files
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raybert import teacher as teacher_room
from raybert.artifact import evaluate_model
from raybert.config import KDConfig, Recipe
from raybert.data import MODEL_INPUTS, load_prepared, prepare
from raybert.errors import UserError
from raybert.models import load_for_task
from raybert.phase import Distillation, Taps
from raybert.plan import make_plan
from raybert.predictions import META, Predictions, fault, takes_saved
from raybert.recipe_file import recipe_from
from raybert.run import compress, predict_teacher
from raybert.surgery import model_inputs
from raybert.teacher import Predictor, check_room, request_for

QUIET: dict[str, Any] = {"tell": lambda text: None}

KINDS = ("classification", "regression", "multilabel", "squad")

SHARD = 7
"""Rows of a shard here: few, so that toy tasks have several."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_room, "SHARD_ROWS", SHARD)


def predicted(recipe: Recipe, **keys: Any) -> Path:
    """The folder of a recipe's saved predictions, made without a word."""
    return predict_teacher(recipe, **{**QUIET, **keys})


def toy_task(kind: str, folder: Path, **keys: Any) -> Recipe:
    """A recipe for predicting a task's rows with an untrained teacher of three layers."""
    folder.mkdir(exist_ok=True)
    model = folder / "teacher"
    cache = str(folder / "cache")
    data = {**task_files(kind, folder), "max_length": 32, "stride": 8, "cache": cache}
    recipe = recipe_from({"task": kind, "data": data, "teacher": str(model), **keys})
    task = prepare(kind, recipe.data, make_tokenizer()).task
    toy_encoder(layers=3).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    network, _ = load_for_task(str(model), task, seed=1)
    network.save_pretrained(model)
    return recipe


def data_of(folder: Path, recipe: Recipe) -> Any:
    return prepare(recipe.task, recipe.data, make_tokenizer())


def contents(folder: Path) -> dict[str, np.ndarray]:
    """All rows of a folder's shards, by column, [N, ...]; those of question answering flat."""
    columns: dict[str, list[np.ndarray]] = {}
    for shard in json.loads((folder / META).read_text())["shards"]:
        batch = pa.ipc.open_file(pa.memory_map(str(folder / shard["file"]))).get_batch(0)
        assert batch.num_rows == shard["rows"]
        for name in batch.schema.names:
            column: Any = batch.column(name)
            flat = column if name == "index" else column.flatten()
            columns.setdefault(name, []).append(flat.to_numpy())
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}


# -- equal to a live teacher -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_map", [(2, 3), (3, 1)])
def test_losses_equal_those_of_a_live_teacher(tmp_path, kind, layer_map):
    recipe = toy_task(kind, tmp_path)
    saved = Predictions(predicted(recipe), cls=True)
    data = data_of(tmp_path, recipe)
    assert saved.rows == len(data.splits["train"]) > 3 * SHARD
    teacher: Any = load_for_task(str(recipe.teacher), data.task, seed=0, new_head=False)[0]
    toy_encoder(layers=2).save_pretrained(tmp_path / "student")
    student: Any = load_for_task(str(tmp_path / "student"), data.task, seed=5)[0]
    taps = [Taps(model, hidden=True, attention=False) for model in (student, teacher)]
    kd = KDConfig.model_validate({"alpha": 0.5, "cls": 10.0})
    distillation = Distillation(kd, data.task.kind, layer_map)
    build = saved.beside(data.batcher("train"))
    order = np.random.default_rng(0).permutation(saved.rows)
    for positions in (order[:11], order[11:20], np.array([saved.rows - 1])):
        batch = build(positions)
        inputs = {k: batch[k] for k in MODEL_INPUTS if k in batch}
        with torch.no_grad():
            out, live = (
                t.collect(m(**inputs)) for t, m in zip(taps, (student, teacher), strict=True)
            )
        taught = saved.outputs(batch)
        assert len(taught.hidden) == 4
        wanted = distillation.losses(out, live, batch)
        found = distillation.losses(out, taught, batch)
        assert found.keys() == {"task", "kd_logits", "kd_cls"}
        for name, term in wanted.items():
            assert term > 0
            assert found[name].item() == pytest.approx(term.item(), rel=2e-3), name
        for one, two in zip(taught.logits(), live.logits(), strict=True):
            real = batch["attention_mask"] == 1 if kind == "squad" else torch.ones_like(one) == 1
            torch.testing.assert_close(one[real], two[real], rtol=1e-4, atol=1e-5)
        for layer in (1, 2, 3):
            torch.testing.assert_close(
                taught.hidden[layer][:, 0], live.hidden[layer][:, 0], rtol=1e-3, atol=1e-3
            )


def test_what_enters_the_first_layer_was_not_kept_and_cannot_be_compared(tmp_path):
    recipe = toy_task("classification", tmp_path)
    saved = Predictions(predicted(recipe), cls=True)
    batch = saved.beside(data_of(tmp_path, recipe).batcher("train"))(np.arange(3))
    with pytest.raises(IndexError):
        saved.outputs(batch).hidden[0][:, 0]


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_other_families_are_predicted(tmp_path, family):
    recipe = toy_task("classification", tmp_path)
    data = data_of(tmp_path, recipe)
    toy_encoder(family, 2).save_pretrained(str(recipe.teacher))
    model: Any = load_for_task(str(recipe.teacher), data.task, seed=1)[0]
    model.save_pretrained(str(recipe.teacher))
    saved = Predictions(predicted(recipe), cls=True)
    batch = saved.beside(data.batcher("train"))(np.array([9, 2]))
    inputs = model_inputs(model, batch)
    with torch.no_grad():
        wanted = model.eval()(**inputs, output_hidden_states=True)
    torch.testing.assert_close(batch["teacher_logits"], wanted.logits, rtol=1e-4, atol=1e-5)
    states = torch.stack([state[:, 0] for state in wanted.hidden_states[1:]], 1)
    torch.testing.assert_close(batch["teacher_cls"].float(), states, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("predictions", ["live", "saved"])
def test_a_student_that_reads_no_types_hides_them_from_no_teacher(tmp_path, predictions):
    recipe = toy_task("classification", tmp_path)
    teacher: Any = AutoModelForSequenceClassification.from_pretrained(str(recipe.teacher))
    dev = data_of(tmp_path, recipe).rows["dev"]
    texts = dev["text"][:], dev["text_pair"][:]
    pairs = make_tokenizer()(*texts, return_tensors="pt", padding=True)
    untyped = {**pairs, "token_type_ids": torch.zeros_like(pairs["input_ids"])}
    with torch.no_grad():  # so that types decide
        teacher.bert.embeddings.token_type_embeddings.weight.mul_(20)
        teacher.classifier.bias.sub_(teacher(**pairs).logits.mean(0))
        right, wrong = (teacher(**inputs).logits.argmax(1) for inputs in (pairs, untyped))
    assert (right != wrong).any()
    teacher.save_pretrained(str(recipe.teacher))
    toy_encoder("distilbert", 2).save_pretrained(tmp_path / "student")
    make_tokenizer(types=False).save_pretrained(tmp_path / "student")
    keys: dict[str, Any] = {"model": str(tmp_path / "student"), "out": str(tmp_path / "run")}
    keys["kd"] = {"alpha": 0.5, "predictions": predictions}
    keys |= {"train": {"epochs": 2, "batch_size": 16}, "measure": {"batches": []}}
    same = {"task": recipe.task, "teacher": recipe.teacher, "data": recipe.data.model_dump()}
    taught = recipe_from({**same, **keys})
    report = json.loads((compress(taught, **QUIET) / "report.json").read_text())
    own = evaluate_model(Path(str(recipe.teacher)), recipe)["metrics"]
    assert report["teacher"]["metrics"] == pytest.approx(own)
    plain = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert plain.model_input_names == ["input_ids", "attention_mask"]


def test_a_student_trained_on_saved_predictions_is_the_one_a_live_teacher_trains(
    toy, teacher, tmp_path
):
    logs, models = [], []
    for how in ("live", "saved"):
        recipe = toy(
            tmp_path / how,
            teacher=str(teacher),
            method="theseus",
            kd={"alpha": 0.5, "cls": 10.0, "predictions": how},
            data={"cache": str(tmp_path / "cache")},
            train={"precision": "fp32"},
        )
        run = compress(recipe, **QUIET)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        logs.append([line for line in lines if line["kind"] == "train"])
        models.append(load_file(run / "model" / "model.safetensors"))
        report = json.loads((run / "report.json").read_text())
        assert report["teacher"]["score"] > report["floor"]
        assert (tmp_path / "cache" / "teacher").exists() == (how == "saved")
    for key in ("loss/task", "loss/kd_logits", "loss/kd_cls"):
        live, saved = ([line[key] for line in log] for log in logs)
        assert live == pytest.approx(saved, rel=5e-3), key
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=0, atol=2e-3, msg=name)


# -- when they are used ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kd", "kind", "passes", "saved"),
    [
        ({"alpha": 0.5}, "qa", 1.0, True),
        ({"alpha": 0.5, "cls": 1.0}, "classification", 3.0, True),
        ({"cls": 1.0}, "classification", 0.5, False),
        ({"alpha": 0.5, "hidden": 1.0}, "classification", 3.0, False),
        ({"alpha": 0.5, "attention": 1.0}, "classification", 3.0, False),
        ({"alpha": 0.5}, "mlm", 3.0, False),
        ({}, "classification", 3.0, False),
        ({"alpha": 0.5, "predictions": "live"}, "classification", 3.0, False),
        ({"alpha": 0.5, "predictions": "saved"}, "classification", 0.5, True),
        ({"hidden": 0.5, "predictions": "live"}, "classification", 3.0, False),
    ],
)
def test_saved_predictions_are_used_where_they_are_enough(kd, kind, passes, saved):
    assert takes_saved(KDConfig.model_validate(kd), kind, passes) is saved


@pytest.mark.parametrize(
    ("kd", "kind", "told"),
    [
        ({"alpha": 0.5, "hidden": 1.0}, "classification", "kd.hidden compares"),
        ({"cls": 0.5, "attention": 1.0}, "classification", "kd.attention compares"),
        ({"alpha": 0.5}, "mlm", "mlm masks other tokens in every epoch"),
    ],
)
@pytest.mark.parametrize("how", ["saved", "a/folder"])
def test_what_needs_a_live_teacher_is_named(kd, kind, told, how):
    with pytest.raises(UserError, match=f"{told}.*live teacher"):
        takes_saved(KDConfig.model_validate({**kd, "predictions": how}), kind, 3.0)


def test_a_folder_that_nothing_is_learnt_from_is_refused():
    with pytest.raises(UserError, match=r"kd\.alpha or kd\.cls a weight"):
        takes_saved(KDConfig.model_validate({"predictions": "a/folder"}), "qa", 3.0)


def test_masked_language_modelling_saves_nothing(tmp_path):
    recipe = toy_task("mlm", tmp_path)
    with pytest.raises(UserError, match="no predictions to save"):
        predicted(recipe)
    assert not (tmp_path / "cache" / "teacher").exists()


def test_mlm_students_are_taught_live_and_no_cache_appears(tmp_path):
    recipe = toy_task("mlm", tmp_path)
    train = {"epochs": 1, "lr": 1e-3, "batch_size": 16}
    data = recipe.data.model_dump()
    keys = {"task": "mlm", "data": data, "teacher": recipe.teacher, "kd": {"alpha": 0.5}}
    method = [{"name": "theseus", "layers": 1}]
    out = {"out": str(tmp_path / "run"), "measure": {"batches": []}}
    compress(recipe_from({**keys, **out, "method": method, "train": train}), **QUIET)
    assert not (tmp_path / "cache" / "teacher").exists()


# -- stale, partial, damaged -----------------------------------------------------------------------


def test_a_second_call_finds_them(tmp_path):
    recipe = toy_task("classification", tmp_path)
    told: list[str] = []
    folder = predicted(recipe)
    before = shards(folder)
    assert predicted(recipe, tell=told.append) == folder
    assert shards(folder) == before
    assert any("there already" in text for text in told)
    assert predicted(recipe, cls=False) == folder
    assert shards(folder) == before


def test_states_that_were_left_out_are_made_when_they_are_asked_for(tmp_path):
    recipe = toy_task("classification", tmp_path)
    told: list[str] = []
    folder = predicted(recipe, cls=False)
    with pytest.raises(UserError, match=r"no \[CLS\] states"):
        Predictions(folder, cls=True)
    logits = contents(folder)["logits"]
    assert "cls" not in contents(folder)
    assert predicted(recipe, tell=told.append) == folder
    assert any("[CLS]" in text and "made again" in text for text in told)
    made = contents(folder)
    assert made["cls"].dtype == np.float16
    np.testing.assert_allclose(made["logits"], logits, rtol=1e-5, atol=1e-6)


def test_other_weights_other_rows_and_other_splits_have_predictions_of_their_own(tmp_path):
    recipe = toy_task("classification", tmp_path)
    first = predicted(recipe)
    assert predicted(recipe, split="dev") != first

    file = Path(recipe.data.train or "")
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    fewer = predicted(recipe)
    assert fewer != first
    assert Predictions(fewer, cls=True).rows == Predictions(first, cls=True).rows - 1

    weights = Path(recipe.teacher or "") / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    shifted = predicted(recipe)
    assert shifted not in (first, fewer)
    one, two = contents(fewer)["logits"], contents(shifted)["logits"]
    np.testing.assert_allclose(two, one + 1, rtol=1e-4, atol=1e-4)


def cut(folder: Path) -> str:
    path = sorted(folder.glob("*.arrow"))[1]
    path.write_bytes(path.read_bytes()[:-10])
    return "bytes instead of"


def flip(folder: Path) -> str:
    path = sorted(folder.glob("*.arrow"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "another checksum"


def delete(folder: Path) -> str:
    sorted(folder.glob("*.arrow"))[1].unlink()
    return "is missing"


def no_meta(folder: Path) -> str:
    (folder / META).unlink()
    sorted(folder.glob("*.arrow"))[1].unlink()
    return "were not all made"


def cut_meta(folder: Path) -> str:
    meta = folder / META
    meta.write_text(meta.read_text()[:100])
    sorted(folder.glob("*.arrow"))[1].unlink()
    return "damaged"


DAMAGE = [cut, flip, delete, no_meta, cut_meta]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_seen_said_and_mended_and_whole_shards_are_kept(tmp_path, damage):
    recipe = toy_task("classification", tmp_path)
    folder = predicted(recipe)
    wanted, before = contents(folder), shards(folder)
    reason = damage(folder)
    request = request_of(recipe)
    assert reason in (fault(folder, request.identity, cls=True) or "")
    told: list[str] = []
    assert predicted(recipe, tell=told.append) == folder
    after = shards(folder)
    assert sum(before[name] == after.get(name) for name in before) == len(before) - 1
    assert any(f"{len(before) - 1} of {len(before)} shards are there" in text for text in told)
    if damage is not no_meta:
        assert any(reason in text and "note:" in text for text in told)
    found = contents(folder)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


def request_of(recipe: Recipe, **keys: Any) -> Any:
    data = prepare(recipe.task, recipe.data, make_tokenizer())
    keys = {"cls": True, "batch_size": 64, "cache": recipe.data.cache_folder, **keys}
    return request_for(str(recipe.teacher), data, "train", **keys)


def test_a_folder_that_says_it_is_anothers_is_never_used(tmp_path):
    one, two = (toy_task("classification", tmp_path / name) for name in ("one", "two"))
    weights = Path(two.teacher or "") / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    theirs, mine = predicted(one), request_of(two).folder
    assert theirs.name != mine.name
    shutil.copytree(theirs, mine)
    told: list[str] = []
    assert predicted(two, tell=told.append) == mine
    assert any("another teacher's" in text for text in told)
    assert shards(mine).keys().isdisjoint(shards(theirs))
    np.testing.assert_allclose(contents(mine)["logits"], contents(theirs)["logits"] + 1, atol=1e-4)


def test_an_interruption_keeps_what_was_made(tmp_path, monkeypatch):
    recipe = toy_task("squad", tmp_path)
    wanted = contents(predicted(recipe, out=tmp_path / "whole"))
    write = Predictor.write

    def interrupted(self: Predictor, shard: int) -> str:
        if shard == 2:
            raise KeyboardInterrupt
        return write(self, shard)

    monkeypatch.setattr(Predictor, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predicted(recipe)
    folder = request_of(recipe).folder
    kept = shards(folder)
    assert len(kept) == 2
    assert not (folder / META).exists()
    with pytest.raises(UserError, match="not all made"):
        Predictions(folder, cls=True)
    monkeypatch.setattr(Predictor, "write", write)
    assert predicted(recipe) == folder
    assert kept.items() <= shards(folder).items()
    found = contents(folder)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


def test_values_that_are_no_numbers_are_refused(tmp_path):
    recipe = toy_task("classification", tmp_path)
    weights = Path(recipe.teacher or "") / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="logits that are no numbers"):
        predicted(recipe)
    assert not (request_of(recipe).folder / META).exists()


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path):
    request = request_of(toy_task("classification", tmp_path))
    with pytest.raises(UserError, match=r"GiB free.*kd\.predictions=live"):
        check_room(replace(request, row_bytes=10**15), request.shards)


# -- a folder of one's own -------------------------------------------------------------------------


def test_a_named_folder_is_used_and_nothing_is_made_beside_it(toy, teacher, tmp_path):
    keys = {"teacher": str(teacher), "data": {"cache": str(tmp_path / "cache")}}
    out = predicted(toy(tmp_path / "none", **keys), out=tmp_path / "own")
    before = shards(out)
    kd = {"alpha": 0.5, "cls": 1.0, "predictions": str(out)}
    run = compress(toy(tmp_path / "run", **keys, method="theseus", kd=kd), **QUIET)
    assert json.loads((run / "report.json").read_text())["student"]["score"]
    assert shards(out) == before
    assert not (tmp_path / "cache" / "teacher").exists()


def test_a_teacher_that_is_fine_tuned_first_predicts_after_that(toy, tmp_path):
    told: list[str] = []
    kd = {"cls": 1.0, "predictions": "saved"}
    keys = {"method": "theseus", "kd": kd, "data": {"cache": str(tmp_path / "cache")}}
    compress(toy(tmp_path / "run", **keys), tell=told.append)
    teacher = tmp_path / "run" / "teacher" / "model"
    assert any(f"predicting 90 train rows with {teacher}" in text for text in told)
    (folder,) = (tmp_path / "cache" / "teacher").iterdir()
    assert Predictions(folder, cls=True).rows == 90


def test_a_named_folder_of_another_teacher_stops_before_the_student(toy, teacher, tmp_path):
    keys: dict[str, Any] = {"data": {"cache": str(tmp_path / "cache")}}
    other = toy(tmp_path / "none", teacher=str(teacher), **keys)
    out = predicted(other, out=tmp_path / "own")
    kd = {"alpha": 0.5, "predictions": str(out)}
    keys |= {"method": "theseus", "kd": kd, "finetune": {"max_steps": 1}}
    with pytest.raises(UserError, match="another teacher's"):
        compress(toy(tmp_path / "run", **keys), **QUIET)
    assert (tmp_path / "run" / "teacher" / "model").is_dir()
    assert not (tmp_path / "run" / "checkpoints").exists()


def another_teacher(recipe: Recipe, _out: Path) -> str:
    weights = Path(recipe.teacher or "") / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})
    return "another teacher's"


def other_rows(recipe: Recipe, _out: Path) -> str:
    file = Path(recipe.data.train or "")
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    return "of other rows"


def other_split(recipe: Recipe, out: Path) -> str:
    shutil.rmtree(out)
    predicted(recipe, out=out, split="dev")
    return "of the dev rows"


def damaged(_recipe: Recipe, out: Path) -> str:
    return flip(out)


def partial(_recipe: Recipe, out: Path) -> str:
    return delete(out)


UNFIT = [another_teacher, other_rows, other_split, damaged, partial]


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_a_named_folder_that_does_not_fit_is_refused_and_not_mended(tmp_path, change):
    recipe = toy_task("classification", tmp_path)
    out = predicted(recipe, out=tmp_path / "own")
    student = recipe_from(
        {
            **recipe.model_dump(include={"task", "data", "teacher"}),
            "method": [{"name": "theseus", "layers": 1}],
            "kd": {"alpha": 0.5, "cls": 1.0, "predictions": str(out)},
            "out": str(tmp_path / "run"),
        }
    )
    assert make_plan(student).saved
    reason = change(recipe, out)
    before = shards(out)
    with pytest.raises(UserError, match=f"cannot be used: .*{reason}"):
        compress(student, **QUIET)
    assert shards(out) == before
    assert not (tmp_path / "run").exists()


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path):
    recipe = toy_task("classification", tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt.*another --out"):
        predicted(recipe, out=tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        predicted(recipe, out=tmp_path / "own" / "thesis.txt")


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_other_predictions_is_left_alone(tmp_path, finished):
    recipe = toy_task("classification", tmp_path)
    out = predicted(recipe, out=tmp_path / "own", split="dev")
    if not finished:
        (out / META).unlink()
    before = shards(out)
    with pytest.raises(UserError, match="they are not overwritten"):
        predicted(recipe, out=out)
    assert shards(out) == before


# -- several workers -------------------------------------------------------------------------------


def toy_rows(folder: Path, count: int, encoder: Path, workers: int) -> Recipe:
    """A classification task of so many rows, with an untrained teacher."""
    folder.mkdir()
    write_rows(folder / "train.csv", count, seed=1)
    write_rows(folder / "dev.csv", 8, seed=2)
    data = {key: str(folder / f"{key}.csv") for key in ("train", "dev")}
    data |= {"text": "text", "label": "label", "cache": str(folder / "cache")}
    recipe = recipe_from(
        {"task": "classification", "data": data, "teacher": str(encoder), "workers": workers}
    )
    task = prepare("classification", recipe.data, make_tokenizer()).task
    model, _ = load_for_task(str(encoder), task, seed=1)
    model.save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    return recipe.model_copy(update={"teacher": str(folder / "teacher")})


@pytest.mark.distributed
def test_two_workers_predict_what_one_does(tmp_path, encoder):
    recipe = toy_rows(tmp_path / "rows", 61, encoder, workers=2)
    two = contents(predicted(recipe))
    alone = recipe.model_copy(update={"workers": 1})
    one = contents(predicted(alone, out=tmp_path / "one"))
    assert one.keys() == two.keys() == {"index", "logits", "cls"}
    np.testing.assert_array_equal(one["index"], np.arange(61))
    np.testing.assert_array_equal(two["index"], np.arange(61))
    np.testing.assert_allclose(one["logits"], two["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one["cls"], two["cls"], rtol=2e-3, atol=2e-3)


@pytest.mark.distributed
def test_a_worker_that_dies_is_replaced(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(teacher_room, "MOST_SHARDS", 10**6)
    recipe = toy_rows(tmp_path / "rows", 3000, encoder, workers=2)
    folder = request_of(recipe, batch_size=recipe.train.eval_batch_size).folder
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            if list(folder.glob("*.arrow")):
                for child in psutil.Process().children(recursive=True):
                    if "_Maker" in " ".join(child.cmdline()) and not killed:
                        killed.append(child.pid)
                        child.kill()
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert predicted(recipe) == folder
    finally:
        killer.join()
    assert killed
    np.testing.assert_array_equal(contents(folder)["index"], np.arange(3000))
    data = load_prepared(request_of(recipe).data)
    assert Predictions(folder, cls=True).rows == len(data.splits["train"])


@pytest.mark.distributed
def test_what_a_worker_cannot_do_is_said_once_without_a_trace(tmp_path, encoder):
    recipe = toy_rows(tmp_path / "rows", 30, encoder, workers=2)
    weights = Path(recipe.teacher or "") / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="logits that are no numbers") as error:
        predicted(recipe)
    assert "Traceback" not in str(error.value)
