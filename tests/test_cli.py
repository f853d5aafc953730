"""The command line: what it refuses and how, and what each command prints."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from conftest import BAD, GOOD, toy_encoder
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from raybert import __version__
from raybert.arguments import parse
from raybert.cli import COMMANDS, main
from raybert.tasks import TASKS


class Bench:
    """The toy task on the command line, with a run folder that is not there yet."""

    def __init__(self, folder: Path, encoder: Path, rows: dict[str, str], teacher: Path) -> None:
        self.folder, self.encoder, self.rows, self.teacher = folder, encoder, rows, teacher
        self.out = folder / "run"

    def words(self, *more: str, model: bool = True) -> list[str]:
        """Words of a valid recipe, with others after them that win."""
        data = [f"data.{key}={value}" for key, value in self.rows.items()]
        start = [f"model={self.encoder}"] if model else []
        few = ["data.max_length=32", "train.max_steps=2", "finetune.max_steps=2"]
        few += ["measure.batches=[]"]  # timing starts a process for each model
        return [*start, "task=classification", *data, *few, f"out={self.out}", *more]

    def file(self, name: str, *lines: str) -> Path:
        """A data file of these lines."""
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path


@pytest.fixture
def toys(tmp_path, encoder, rows, teacher) -> Bench:
    return Bench(tmp_path, encoder, rows, teacher)


@pytest.fixture(autouse=True)
def no_loading_bars():
    """As the command line has it, which says so before transformers is imported."""
    disable_progress_bar()


def refused(capsys, argv: list[str], *told: str) -> str:
    """The paragraph that a command refuses with, after checking that it is one."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("raybert: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    for text in told:
        assert text in err, err
    return err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- bad input -------------------------------------------------------------------------------------

BadInput = tuple[str, list[str], list[str]]
"""The command, its words, and what the refusal must say."""


def unknown_key(t: Bench) -> BadInput:
    return "finetune", t.words("train.bach_size=8"), ["train.bach_size", "'train.batch_size'"]


def unknown_section(t: Bench) -> BadInput:
    return "finetune", t.words("trian.lr=1"), ["`trian`", "'train'"]


def wrong_type(t: Bench) -> BadInput:
    return "finetune", t.words("train.epochs=many"), ["`train.epochs`", "'many'"]


def two_recipes(t: Bench) -> BadInput:
    return "finetune", ["one.yaml", "two.yaml"], ["one recipe at a time", "one.yaml and two.yaml"]


def missing_recipe(t: Bench) -> BadInput:
    return "finetune", ["nothing.yaml", *t.words()], ["no recipe 'nothing.yaml'"]


def unknown_task(t: Bench) -> BadInput:
    return "finetune", t.words("task=mrcp"), ["unknown task 'mrcp'", "'mrpc'"]


def missing_file(t: Bench) -> BadInput:
    path = t.folder / "absent.csv"
    return "finetune", t.words(f"data.train={path}"), [f"no such file: {path}"]


def missing_source(t: Bench) -> BadInput:
    path = t.folder / "absent"
    words = [w for w in t.words(f"data={path}") if not w.startswith(("data.train", "data.dev"))]
    return "finetune", words, ["no such file or folder", str(path)]


def short_line(t: Bench) -> BadInput:
    path = t.file("train.tsv", "text\tlabel", "a film\tgood", "a plot", "an actor\tbad")
    return "finetune", t.words(f"data.train={path}"), [f"{path}, line 3: 1 columns, wanted 2"]


def missing_column(t: Bench) -> BadInput:
    return "finetune", t.words("data.text=txet"), ["no column 'txet'", "'text'"]


def unknown_label(t: Bench) -> BadInput:
    path = t.file("dev.csv", "text,label", "a film,good", "a plot,ugly")
    return "finetune", t.words(f"data.dev={path}"), [f"{path}, line 3", "'ugly' is not a label"]


def empty_split(t: Bench) -> BadInput:
    path = t.file("dev.csv", "text,label")
    return "finetune", t.words(f"data.dev={path}"), [str(path), "no rows for the dev split"]


def empty_file(t: Bench) -> BadInput:
    path = t.file("train.csv")
    return "finetune", t.words(f"data.train={path}"), [str(path), "is empty"]


def empty_texts(t: Bench) -> BadInput:
    path = t.file("train.csv", "text,label", ",good", " ,bad", ",good")
    return "finetune", t.words(f"data.train={path}"), ["column 'text' is empty in every row"]


def one_class(t: Bench) -> BadInput:
    path = t.file("train.csv", "text,label", "a film,good", "a plot,good")
    return "finetune", t.words(f"data.train={path}"), [str(path), "'label'", "at least two"]


def _scores(t: Bench) -> list[str]:
    rows = [f"a film,{i / 7}" for i in range(8)]
    path = t.file("scores.csv", "text,label", *rows)
    return ["task=regression", f"data.train={path}", f"data.dev={path}"]


def class_head_teaches_regression(t: Bench) -> BadInput:
    words = t.words(*_scores(t), f"teacher={t.teacher}", "method=theseus", model=False)
    return "compress", words, ["head of 2 outputs", "regression", "needs 1"]


def class_head_teaches_a_regression_model(t: Bench) -> BadInput:
    words = t.words(*_scores(t), f"teacher={t.teacher}", "kd.alpha=0.5")
    return "compress", words, ["head of 2 outputs", "regression", "needs 1"]


def teacher_without_a_head(t: Bench) -> BadInput:
    words = t.words(f"teacher={t.encoder}", "method=theseus", model=False)
    return "compress", words, [str(t.encoder), "was not fine-tuned"]


def other_vocabulary(t: Bench) -> BadInput:
    other = t.folder / "other"
    toy_encoder().save_pretrained(other)
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "x": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(other)
    words = t.words(f"model={other}", f"teacher={t.teacher}", "kd.alpha=0.5")
    return "compress", words, ["different vocabularies", "(25 and 3 tokens)"]


def layers_do_not_divide(t: Bench) -> BadInput:
    words = t.words("method.theseus.layers=3")
    return "compress", words, ["theseus.layers 3 does not divide", "[1, 2]", "[1, 1, 2]"]


def no_model_folder(t: Bench) -> BadInput:
    folder = t.folder / "empty"
    folder.mkdir()
    return "finetune", t.words(f"model={folder}"), ["is not a model folder", "config.json"]


def broken_config(t: Bench) -> BadInput:
    folder = t.folder / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    return "finetune", t.words(f"model={folder}"), [str(folder), "cannot be read"]


def no_tokenizer(t: Bench) -> BadInput:
    folder = t.folder / "mute"
    toy_encoder().save_pretrained(folder)
    return "finetune", t.words(f"model={folder}"), ["no tokenizer", str(folder)]


def foreign_tokenizer(t: Bench) -> BadInput:
    folder = t.folder / "foreign"
    shutil.copytree(t.encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    return "finetune", t.words(f"model={folder}"), ["has 25 tokens and the model embeds 20"]


def labels_in_another_order(t: Bench) -> BadInput:
    words = t.words(f"teacher={t.teacher}", "method=theseus", "data.labels=[good,bad]", model=False)
    return "compress", words, ["in the order bad, good", "data.labels=[bad,good]"]


def labels_in_another_order_and_case(t: Bench) -> BadInput:
    folder = t.folder / "shouting"
    shutil.copytree(t.teacher / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "GOOD", "1": "BAD"}, "label2id": {"GOOD": 0, "BAD": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    words = t.words(f"teacher={folder}", "method=theseus", model=False)
    return "compress", words, ["in the order good, bad", "data.labels=[good,bad]"]


def rows_longer_than_the_model_reads(t: Bench) -> BadInput:
    words = t.words("data.max_length=1000", model=False)
    return "evaluate", [str(t.teacher / "model"), *words], ["1000 is more than", "at most 160"]


def unknown_family(t: Bench) -> BadInput:
    folder = t.folder / "gpt2"
    GPT2Config().save_pretrained(folder)
    return "finetune", t.words(f"model={folder}"), ["'gpt2' model", "bert, roberta, distilbert"]


def pickled_weights(t: Bench) -> BadInput:
    folder = t.folder / "pickled"
    shutil.copytree(t.encoder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return "finetune", t.words(f"model={folder}"), [str(folder), "safetensors"]


def cut_weights(t: Bench) -> BadInput:
    folder = t.folder / "cut"
    shutil.copytree(t.encoder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "finetune", t.words(f"model={folder}"), [str(weights), "damaged"]


def unfinished_run(t: Bench) -> BadInput:
    folder = t.folder / "unfinished"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("task: demo\n")
    return "finetune", t.words(f"model={folder}"), [str(folder), "not finished"]


def too_many_workers(t: Bench) -> BadInput:
    return "finetune", t.words("workers=999", "train.batch_size=999"), ["999 workers", "cores"]


def too_many_workers_at_least(t: Bench) -> BadInput:
    words = t.words("workers=998-999", "train.batch_size=999")
    return "finetune", words, ["998 workers", "cores"]


def batch_smaller_than_workers(t: Bench) -> BadInput:
    words = t.words("train.batch_size=2", "train.accumulation=4")
    return "finetune", words, ["train.batch_size 2", "use at least 4"]


def zero_3_with_a_method(t: Bench) -> BadInput:
    return "compress", t.words("method=theseus", "train.zero=3"), ["train.zero 3", "fine-tuning"]


def too_long(t: Bench) -> BadInput:
    return "finetune", t.words("data.max_length=1000"), ["data.max_length 1000", "at most 160"]


def layer_map_of_another_depth(t: Bench) -> BadInput:
    kd = ["method=theseus", "kd.cls=1", "kd.layer_map=[1,2,3]"]
    words = t.words(f"teacher={t.teacher}", *kd, model=False)
    return "compress", words, ["kd.layer_map has 3 entries", "2 layers", "[2, 4]"]


def layer_map_for_a_chain_that_shortens_late(t: Bench) -> BadInput:
    words = t.words("method=lobert,theseus", "method.lobert.share=0.7", "kd.cls=1")
    words.append("kd.layer_map=[2,4]")
    return "compress", words, ["phase low_rank trains 4", "Put theseus first"]


def layer_map_before_there_is_a_teacher(t: Bench) -> BadInput:
    words = t.words("method=theseus", "kd.cls=1", "kd.layer_map=[2,5]")
    return "compress", words, ["kd.layer_map names teacher layer 5", "1 to 4"]


def distilling_without_a_teacher(t: Bench) -> BadInput:
    return "finetune", t.words("kd.alpha=0.5"), ["kd needs a teacher"]


def nothing_to_compress(t: Bench) -> BadInput:
    return "compress", t.words(), ["nothing to compress with", "method=theseus"]


def a_method_to_fine_tune_with(t: Bench) -> BadInput:
    return "finetune", t.words("method=theseus"), ["takes no method", "raybert compress"]


def no_steps(t: Bench) -> BadInput:
    return "finetune", t.words("train.epochs=0"), ["train.epochs 0", "no step"]


def half_precision_on_a_cpu(t: Bench) -> BadInput:
    words = t.words("train.precision=fp16", "resources.gpu=false")
    return "finetune", words, ["fp16 needs a GPU"]


def half_precision_at_a_zero_stage(t: Bench) -> BadInput:
    words = t.words("train.precision=fp16", "train.zero=1")
    return "finetune", words, ["fp16 does not go with train.zero 1", "train.zero=0"]


def replacing_in_a_model_without_the_head(t: Bench) -> BadInput:
    words = t.words(f"teacher={t.teacher}", "method=theseus")
    return "compress", words, ["was not fine-tuned for", "Leave `model` out"]


def saved_predictions_of_every_token(t: Bench) -> BadInput:
    kd = ["kd.alpha=0.5", "kd.hidden=1", "kd.predictions=saved"]
    words = t.words(f"teacher={t.teacher}", "method=theseus", *kd, model=False)
    return "compress", words, ["kd.hidden", "live teacher", "kd.predictions=live"]


def saved_predictions_of_masked_words(t: Bench) -> BadInput:
    text = t.file("text.txt", *["the film was good"] * 20)
    files = ["task=mlm", f"data.train={text}", f"data.dev={text}", "data.text=null"]
    kd = ["kd.alpha=0.5", "kd.predictions=saved", "data.label=null"]
    return "compress", t.words(*files, "method=theseus", *kd), ["mlm masks other tokens", "live"]


def predictions_that_are_nowhere(t: Bench) -> BadInput:
    kd = ["kd.alpha=0.5", f"kd.predictions={t.folder / 'absent'}"]
    words = t.words(f"teacher={t.teacher}", "method=theseus", *kd, model=False)
    return "compress", words, ["absent is neither auto, live, saved nor a folder"]


def predictions_in_a_folder_of_something_else(t: Bench) -> BadInput:
    kd = ["kd.alpha=0.5", f"kd.predictions={t.teacher}"]
    words = t.words("method=theseus", *kd)
    return "compress", words, [str(t.teacher), "meta.json is not there", "predict-teacher"]


def predictions_that_nobody_reads(t: Bench) -> BadInput:
    words = t.words("method=theseus", f"kd.predictions={t.teacher}")
    return "compress", words, ["nothing is learnt from it", "kd.alpha"]


def predicting_without_a_teacher(t: Bench) -> BadInput:
    return "predict-teacher", t.words(), ["needs a teacher", "teacher="]


def predicting_with_an_encoder(t: Bench) -> BadInput:
    words = t.words(f"teacher={t.encoder}", model=False)
    return "predict-teacher", words, [str(t.encoder), "was not fine-tuned"]


def predicting_rows_that_are_not_there(t: Bench) -> BadInput:
    words = t.words(f"teacher={t.teacher}", "--split", "test", model=False)
    return "predict-teacher", words, ["no test rows here; there are train, dev"]


def predicting_into_a_folder_of_something_else(t: Bench) -> BadInput:
    words = t.words(f"teacher={t.teacher}", "--out", str(t.encoder), model=False)
    return "predict-teacher", words, [str(t.encoder), "nothing in it is touched", "--out"]


BAD_INPUT: list[Callable[[Bench], BadInput]] = [
    unknown_key,
    unknown_section,
    wrong_type,
    two_recipes,
    missing_recipe,
    unknown_task,
    missing_file,
    missing_source,
    short_line,
    missing_column,
    unknown_label,
    empty_split,
    empty_file,
    empty_texts,
    one_class,
    class_head_teaches_regression,
    class_head_teaches_a_regression_model,
    teacher_without_a_head,
    other_vocabulary,
    layers_do_not_divide,
    no_model_folder,
    broken_config,
    no_tokenizer,
    foreign_tokenizer,
    labels_in_another_order,
    labels_in_another_order_and_case,
    rows_longer_than_the_model_reads,
    unknown_family,
    pickled_weights,
    cut_weights,
    unfinished_run,
    too_many_workers,
    too_many_workers_at_least,
    batch_smaller_than_workers,
    zero_3_with_a_method,
    too_long,
    layer_map_of_another_depth,
    layer_map_for_a_chain_that_shortens_late,
    layer_map_before_there_is_a_teacher,
    distilling_without_a_teacher,
    nothing_to_compress,
    a_method_to_fine_tune_with,
    no_steps,
    half_precision_on_a_cpu,
    half_precision_at_a_zero_stage,
    replacing_in_a_model_without_the_head,
    saved_predictions_of_every_token,
    saved_predictions_of_masked_words,
    predictions_that_are_nowhere,
    predictions_in_a_folder_of_something_else,
    predictions_that_nobody_reads,
    predicting_without_a_teacher,
    predicting_with_an_encoder,
    predicting_rows_that_are_not_there,
    predicting_into_a_folder_of_something_else,
]


@pytest.mark.parametrize("make", BAD_INPUT, ids=lambda make: make.__name__)
def test_bad_input_is_refused_in_a_paragraph_and_nothing_is_written(toys, capsys, make):
    command, words, told = make(toys)
    before = snapshot(toys.folder)
    refused(capsys, [command, *words], *told)
    assert not toys.out.exists()
    assert snapshot(toys.folder) == before


@pytest.mark.parametrize(
    "make", [missing_file, layers_do_not_divide, pickled_weights], ids=lambda make: make.__name__
)
def test_a_dry_run_refuses_what_a_run_does(toys, capsys, make):
    command, words, told = make(toys)
    refused(capsys, [command, *words, "--dry-run"], *told)
    assert not toys.out.exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_folder_with_another_run_is_left_alone(toys, capsys, dry):
    shutil.copytree(toys.teacher, toys.out)
    before = snapshot(toys.out)
    told = [f"{toys.out} holds another run", "train.epochs is 6.0 there and 3.0 here", "out="]
    refused(capsys, ["finetune", *toys.words(), *dry], *told)
    assert snapshot(toys.out) == before


def test_a_folder_with_other_files_is_left_alone(toys, capsys):
    toys.out.mkdir()
    (toys.out / "thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"]):
        refused(capsys, ["finetune", *toys.words(), *more], "is not a run folder")
        assert snapshot(toys.out) == {"thesis.txt": b"years of work"}


def test_overwrite_removes_nothing_when_the_new_run_is_refused(toys, capsys):
    shutil.copytree(toys.teacher, toys.out)
    before = snapshot(toys.out)
    words = toys.words(f"data.train={toys.folder / 'absent.csv'}")
    refused(capsys, ["finetune", *words, "--overwrite"], "no such file")
    assert snapshot(toys.out) == before


def test_overwrite_does_not_remove_the_teacher_it_needs(toys, capsys):
    shutil.copytree(toys.teacher, toys.out)
    before = snapshot(toys.out)
    words = toys.words(f"teacher={toys.out}", "method=theseus", model=False)
    refused(capsys, ["compress", *words, "--overwrite"], "teacher", str(toys.out))
    assert snapshot(toys.out) == before


# -- what the commands do --------------------------------------------------------------------------


def test_print_recipe_gives_a_recipe_that_means_the_same(toys, capsys):
    assert main(["compress", *toys.words("method=theseus", "kd.alpha=0.5"), "--print-recipe"]) == 0
    printed = capsys.readouterr().out
    data = yaml.safe_load(printed)
    assert data["train"]["max_steps"] == 2
    assert data["kd"]["alpha"] == 0.5
    assert data["model"] == str(toys.encoder)
    file = toys.file("recipe.yaml", printed)
    assert main(["compress", str(file), "--print-recipe"]) == 0
    assert capsys.readouterr().out == printed
    assert not toys.out.exists()


def test_a_dry_run_predicts_and_writes_no_run(toys, capsys):
    assert main(["compress", *toys.words("method=theseus"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    lines = {line.split()[0]: line for line in told.splitlines()}
    assert "rows: train 90, dev 41" in lines["task"]
    assert "replace (2 steps)" in lines["phases"]
    assert "fine-tuned first" in lines["teacher"]
    for key in ("before", "after"):
        assert all(word in lines[key] for word in ("parameters", "MB", "GFLOPs")), lines[key]
    before, after = (float(lines[key].split("M ")[1].split("(")[1]) for key in ("before", "after"))
    assert after == pytest.approx(before / 2, rel=0.2)
    assert not toys.out.exists()


def test_tasks_are_listed(capsys):
    assert main(["tasks"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TASKS)


def test_the_schema_is_a_schema(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "theseus" in json.dumps(schema)


def test_the_package_runs_as_a_module():
    argv = [sys.executable, "-m", "raybert", "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"raybert {__version__}\n"


def test_an_interruption_has_its_own_exit_code(toys, capsys, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raybert.run.finetune", interrupt)
    assert main(["finetune", *toys.words()]) == 130
    assert "continues from the last checkpoint" in capsys.readouterr().err


def test_evaluate_gives_the_metrics_of_the_run(toys, capsys):
    assert main(["evaluate", str(toys.teacher), *toys.words(model=False)]) == 0
    result = json.loads(capsys.readouterr().out)
    report = json.loads((toys.teacher / "report.json").read_text())
    assert result["rows"] == 41
    assert result["metrics"] == pytest.approx(report["student"]["metrics"])
    assert result["floors"][report["metric"]] == pytest.approx(report["floor"])


def test_predict_teacher_tells_what_it_made_and_finds_it_again(toys, capsys):
    out = toys.folder / "predictions"
    argv = ["predict-teacher", *toys.words(f"teacher={toys.teacher}", model=False)]
    argv += ["--out", str(out), "--no-cls"]
    assert main(argv) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    made = snapshot(out)
    size = sum(len(content) for name, content in made.items() if name != "meta.json")
    wanted = {"predictions": str(out), "rows": "90", "shards": "1", "bytes": str(size)}
    assert told == wanted
    assert main(argv) == 0
    assert "there already" in capsys.readouterr().err
    assert snapshot(out) == made
    words = toys.words(f"teacher={toys.teacher}", "method=theseus", "kd.cls=1", model=False)
    argv = ["compress", "--dry-run", *words, f"kd.predictions={out}"]
    refused(capsys, argv, str(out), "no [CLS] states")
    assert main([*argv, "kd.cls=0", "kd.alpha=0.5"]) == 0
    assert "predictions are saved once" in capsys.readouterr().out


def test_evaluate_predicts_test_rows(toys, capsys):
    telling = [*GOOD, *BAD]
    test = toys.file("test.csv", "text", *(f"the film was very {word}" for word in telling))
    answers = toys.folder / "answers.tsv"
    words = toys.words(f"data.test={test}", model=False)
    argv = ["evaluate", str(toys.teacher), *words, "--split", "test"]
    refused(capsys, argv, "no labels to score", "--submission")
    argv += ["--submission", str(answers)]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["submission"] == str(answers)
    with answers.open() as file:
        given = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
    wanted = ["good"] * len(GOOD) + ["bad"] * len(BAD)
    assert len(given) == len(wanted)
    assert set(given) == {"good", "bad"}
    assert sum(a == b for a, b in zip(given, wanted, strict=True)) >= 8
    before = answers.read_bytes()
    refused(capsys, argv, "not overwritten")
    assert answers.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--split", "test"], "no test rows here; there are train, dev"),
        (["data.labels=[good,bad,so]"], "head of 2 outputs"),
    ],
)
def test_evaluate_refuses_what_the_model_cannot_do(toys, capsys, words, told):
    argv = ["evaluate", str(toys.teacher), *toys.words(model=False)]
    refused(capsys, [*argv, *words], told)


def test_bench_measures_two_models_and_speaks_json(toys, capsys):
    shallow = toys.folder / "shallow"
    shutil.copytree(toys.teacher / "model", shallow)
    argv = ["bench", str(shallow), "--against", str(toys.teacher), "--json"]
    argv += ["--seconds", "0.2", "--batch", "1,2", "--length", "16", "--threads", "1"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["model"], r["batch"], r["length"]) for r in result["latency"]] == [
        (name, batch, 16) for batch in (1, 2) for name in ("model", "against")
    ]
    assert all(row["p95_ms"] >= row["p50_ms"] > 0 for row in result["latency"])
    assert {row["batch"] for row in result["speedup"]} == {1, 2}
    sizes = [result["models"][name]["parameters"] for name in ("model", "against")]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("flag", ["--batch", "--length"])
@pytest.mark.parametrize("value", ["many", "0", "1,,2"])
def test_bench_refuses_what_is_no_list_of_numbers(toys, capsys, flag, value):
    refused(capsys, ["bench", str(toys.teacher), flag, value], f"{flag} {value!r}")


def test_compress_report_and_overwrite(toys, capsys):
    words = toys.words(f"teacher={toys.teacher}", "method=theseus", model=False)
    assert main(["compress", *words]) == 0
    told = capsys.readouterr()
    assert str(toys.out / "model") in told.out
    assert "theseus" in told.out
    for name in ("recipe.yaml", "metrics.jsonl", "report.json", "report.html", "model/README.md"):
        assert (toys.out / name).is_file(), name

    before = snapshot(toys.out)
    assert main(["compress", *words]) == 0
    assert "finished already" in capsys.readouterr().err
    assert snapshot(toys.out) == before

    page = toys.folder / "page"
    assert main(["report", str(toys.out), str(toys.teacher), "--out", str(page)]) == 0
    capsys.readouterr()
    text = (page / "report.md").read_text()
    assert "theseus" in text
    assert "<html" in (page / "report.html").read_text()
    refused(capsys, ["report", str(page)], str(page))

    again = [*words, "train.lr=1e-3"]
    refused(capsys, ["compress", *again], "holds another run")
    assert main(["compress", *again, "--overwrite"]) == 0
    held = yaml.safe_load((toys.out / "recipe.yaml").read_text())
    assert held["train"]["lr"] == 1e-3
    assert json.loads((toys.out / "report.json").read_text())["student"]["parameters"]


def test_overrides_may_stand_behind_options(capsys):
    args = parse(["compress", "task=mrpc", "--dry-run", "train.lr=3e-5", "method=theseus"])
    assert args.words == ["task=mrpc", "train.lr=3e-5", "method=theseus"]
    for words in (["compress", "--dry", "--nonsense"], ["tasks", "task=mrpc"]):
        with pytest.raises(SystemExit):
            parse(words)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_every_command_that_is_listed_is_carried_out(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    listed = re.findall(r"^    ([a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
