"""Tasks: the registry, its overrides, what a batch is reduced to, and the submission files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raybert.config import DataConfig
from raybert.errors import UserError
from raybert.tasks import IGNORED, KIND_METRICS, TASKS, get_task, row_outputs, write_submission


def test_every_task_is_ranked_by_a_metric_of_its_kind() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert task.main in task.metrics
        assert task.main in KIND_METRICS[task.kind]


def test_heads_have_as_many_outputs_as_the_papers() -> None:
    wanted = {"mrpc": 2, "mnli": 3, "mnli_mm": 3, "stsb": 1, "squad": 2, "squad2": 2, "cola": 2}
    assert {name: TASKS[name].num_labels for name in wanted} == wanted


def test_overrides_replace_the_registry() -> None:
    columns = {"text": "a", "text_pair": "b", "label": "c", "labels": ("x", "y", "z")}
    data = DataConfig.model_validate({**columns, "metric": "matthews", "n_best": 7})
    task = get_task("classification", data)
    assert (task.text, task.text_pair, task.label) == ("a", "b", "c")
    assert (task.labels, task.num_labels, task.n_best) == (("x", "y", "z"), 3, 7)
    assert task.main == "matthews"
    assert task.metrics == ("matthews", "accuracy", "f1")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("mprc", {}, ["mprc", "did you mean 'mrpc'"]),
        ("mrpc", {"metric": "acuracy"}, ["acuracy", "did you mean 'accuracy'"]),
        ("stsb", {"metric": "accuracy"}, ["regression", "pearson"]),
        ("mlm", {"metric": "perplexity"}, ["lower is better", "masked_accuracy"]),
        ("mlm", {"mask": 0.0}, ["data.mask"]),
        ("mrpc", {"labels": ("a", "b", "c")}, ["3 labels", "task=classification"]),
        ("classification", {"labels": ("a", "a")}, ["each once"]),
        ("squad", {"labels": ("a", "b")}, ["qa task"]),
    ],
)
def test_bad_options_are_refused(name: str, data: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        get_task(name, DataConfig.model_validate(data))
    for word in words:
        assert word in str(error.value)


def test_qa_outputs_are_of_fixed_width_and_stay_in_the_context() -> None:
    task = get_task("squad", DataConfig.model_validate({"n_best": 4}))
    start = torch.tensor([[9.0, 8.0, 1.0, 3.0, 2.0], [0.0, 5.0, 4.0, 7.0, 9.0]])
    mask = torch.tensor([[False, False, True, True, True], [False, False, False, True, False]])
    out = SimpleNamespace(start_logits=start, end_logits=start.flip(0))
    rows = row_outputs(task, out, {"context_mask": mask})
    assert rows["starts"].tolist() == [[3, 4, 2, -1], [3, -1, -1, -1]]
    assert rows["start_logits"][0, :3].tolist() == [3.0, 2.0, 1.0]
    assert rows["null"].tolist() == [9.0, 9.0]
    # Windows shorter than n_best give arrays of the same width.
    short = SimpleNamespace(start_logits=start[:, :3], end_logits=start[:, :3])
    assert row_outputs(task, short, {"context_mask": mask[:, :3]})["ends"].shape == (2, 4)


def test_mlm_outputs_match_cross_entropy_row_by_row() -> None:
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.full((3, 5), IGNORED)
    labels[0, 1], labels[0, 3], labels[2, 4] = 4, 7, int(logits[2, 4].argmax())
    rows = row_outputs(TASKS["mlm"], SimpleNamespace(logits=logits.bfloat16()), {"labels": labels})
    nll = torch.nn.functional.cross_entropy(
        logits.bfloat16().float()[0], labels[0], reduction="sum"
    )
    assert rows["count"].tolist() == [2, 0, 1]
    assert rows["nll"][0] == pytest.approx(nll.item(), rel=1e-5)
    assert rows["nll"][1] == 0
    assert rows["correct"][2] == 1


def test_classification_outputs_are_float32() -> None:
    out = SimpleNamespace(logits=torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    logits = row_outputs(TASKS["mnli"], out, {})["logits"]
    assert logits.dtype == np.float32
    assert logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "values", "file", "lines"),
    [
        ("mrpc", ["equivalent", "not_equivalent"], "MRPC.tsv", ["0\t1", "1\t0"]),
        (
            "rte",
            ["entailment", "not_entailment"],
            "RTE.tsv",
            ["0\tentailment", "1\tnot_entailment"],
        ),
        ("mnli_mm", ["neutral"], "MNLI-mm.tsv", ["0\tneutral"]),
        ("stsb", [5.7, -0.2, 2.34567], "STS-B.tsv", ["0\t5.000", "1\t0.000", "2\t2.346"]),
    ],
)
def test_submissions_have_the_leaderboard_form(
    name: str, values: list, file: str, lines: list[str], tmp_path
) -> None:
    path = write_submission(TASKS[name], values, tmp_path / "out")
    assert path == tmp_path / "out" / file
    assert path.read_text().splitlines() == ["index\tprediction", *lines]
    assert list(path.parent.iterdir()) == [path]


def test_squad_submission_is_json_by_id(tmp_path) -> None:
    path = write_submission(TASKS["squad"], [("a", "Zürich"), ("b", "")], tmp_path / "p.json")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "Zürich", "b": ""}


def test_submission_is_not_overwritten(tmp_path) -> None:
    (tmp_path / "RTE.tsv").write_text("mine")
    with pytest.raises(UserError, match="already there"):
        write_submission(TASKS["rte"], ["entailment"], tmp_path)
    assert (tmp_path / "RTE.tsv").read_text() == "mine"
