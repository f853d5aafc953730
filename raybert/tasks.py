"""What a task is: its columns, its labels, its head, its metrics, and what one batch of predictions
is reduced to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from raybert.config import DataConfig
from raybert.errors import UserError
from raybert.explain import nearest
from raybert.folders import write_whole
from raybert.method import Section

Kind = Literal["classification", "multilabel", "regression", "qa", "mlm"]

KIND_METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "multilabel": ("f1", "accuracy"),
    "regression": ("pearson", "spearman"),
    "qa": ("f1", "em"),
    "mlm": ("masked_accuracy",),
}
"""The metrics that may rank the models of each kind of task; higher is better for all of them."""

IGNORED = -100
"""The label of a token that masked language modelling does not ask for (PyTorch's
``ignore_index``)."""

# A logit that no softmax or sum of two lets win; -inf would make the sums of padded candidates NaN.
NEVER = -1e9


HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
GLUE_SPLITS = {"train": "train", "dev": "dev", "test": "test"}


class Task(Section):
    """One task, with the column names that its rows have on the Hub and in a user's own files."""

    name: str
    kind: Kind
    metrics: tuple[str, ...]
    main: str
    labels: tuple[str, ...] | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    hub: str | None = None
    subset: str | None = None
    hub_splits: dict[str, str] = Field(default=HUB_SPLITS)
    glue: str | None = None
    glue_splits: dict[str, str] = Field(default=GLUE_SPLITS)
    submission: str | None = None
    submits_names: bool = False
    no_answer: bool = False
    n_best: int = 20
    max_answer: int = 30
    mask: float = 0.15

    @property
    def num_labels(self) -> int:
        """Outputs of the head: a label each, 1 for regression, 2 (start and end) for QA."""
        if self.kind == "regression":
            return 1
        if self.kind == "qa":
            return 2
        if self.labels is None:
            raise ValueError(f"the labels of {self.name} are not known before its rows are read")
        return len(self.labels)


def _glue(name: str, folder: str, label_names: str, text: str = "sentence", **more: Any) -> Task:
    """A GLUE classification task scored by accuracy, unless ``more`` says otherwise."""
    fields: dict[str, Any] = {
        "kind": "classification",
        "metrics": ("accuracy",),
        "main": "accuracy",
        "labels": tuple(label_names.split()),
        "hub": "nyu-mll/glue",
        "subset": name,
        "glue": folder,
        "submission": f"{folder}.tsv",
        "text": text,
    }
    return Task(name=name, **{**fields, **more})


_ENTAILMENT = "entailment not_entailment"
_MNLI = "entailment neutral contradiction"
_PAIR: dict[str, Any] = {"text": "sentence1", "text_pair": "sentence2"}


def _mnli(name: str, side: str, submission: str) -> Task:
    return _glue(
        name,
        "MNLI",
        _MNLI,
        text="premise",
        text_pair="hypothesis",
        subset="mnli",
        hub_splits={"train": "train", "dev": f"validation_{side}", "test": f"test_{side}"},
        glue_splits={"train": "train", "dev": f"dev_{side}", "test": f"test_{side}"},
        submission=submission,
        submits_names=True,
    )


_F1 = {"metrics": ("f1", "accuracy"), "main": "f1"}
_QA: dict[str, Any] = {
    "kind": "qa",
    "metrics": ("f1", "em"),
    "main": "f1",
    "text": "question",
    "text_pair": "context",
    "label": "answers",
    "hub_splits": {"train": "train", "dev": "validation"},
    "submission": "predictions.json",
}
_OWN = {"submission": "predictions.tsv", "submits_names": True}

_ALL = (
    _glue("cola", "CoLA", "unacceptable acceptable", metrics=("matthews",), main="matthews"),
    _glue("sst2", "SST-2", "negative positive"),
    _glue("mrpc", "MRPC", "not_equivalent equivalent", **_PAIR, **_F1),
    _glue(
        "stsb",
        "STS-B",
        "",
        **_PAIR,
        labels=None,
        kind="regression",
        metrics=("pearson", "spearman"),
        main="pearson",
    ),
    _glue("qqp", "QQP", "not_duplicate duplicate", "question1", text_pair="question2", **_F1),
    _mnli("mnli", "matched", "MNLI-m.tsv"),
    _mnli("mnli_mm", "mismatched", "MNLI-mm.tsv"),
    _glue("qnli", "QNLI", _ENTAILMENT, "question", text_pair="sentence", submits_names=True),
    _glue("rte", "RTE", _ENTAILMENT, **_PAIR, submits_names=True),
    _glue("wnli", "WNLI", "not_entailment entailment", **_PAIR),
    Task(
        name="imdb",
        kind="classification",
        metrics=("accuracy",),
        main="accuracy",
        labels=("neg", "pos"),
        hub="stanfordnlp/imdb",
        # IMDb has no other labelled rows to evaluate on.
        hub_splits={"train": "train", "dev": "test"},
        **_OWN,
    ),
    Task(name="squad", hub="rajpurkar/squad", **_QA),
    Task(name="squad2", hub="rajpurkar/squad_v2", no_answer=True, **_QA),
    Task(name="mlm", kind="mlm", metrics=("masked_accuracy", "perplexity"), main="masked_accuracy"),
    Task(
        name="demo",
        kind="classification",
        metrics=("accuracy",),
        main="accuracy",
        labels=("negative", "positive"),
        **_OWN,
    ),
    Task(
        name="classification",
        kind="classification",
        metrics=("accuracy", "f1"),
        main="accuracy",
        **_OWN,
    ),
    Task(name="multilabel", kind="multilabel", metrics=("f1", "accuracy"), main="f1", **_OWN),
    Task(
        name="regression",
        kind="regression",
        metrics=("pearson", "spearman"),
        main="pearson",
        **_OWN,
    ),
    Task(name="qa", **_QA),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""Every task by name. The last four, and ``mlm``, are for the user's own rows."""


def get_task(name: str, data: DataConfig) -> Task:
    """The task ``name`` with what the recipe's ``data`` section says in place of the registry's
    columns and metric.

    Raises:
        UserError: no such task or metric, or labels that the kind of task does not have.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)}; known: {', '.join(TASKS)}.")
    task = TASKS[name]
    change: dict[str, Any] = {
        "n_best": data.n_best,
        "max_answer": data.max_answer,
        "mask": data.mask,
    }
    for key in ("text", "text_pair", "label", "subset"):
        value = data.model_dump()[key]
        if value is not None:
            change[key] = value
    if data.labels is not None:
        change["labels"] = _own_labels(task, data.labels)
    if data.metric is not None:
        change |= _own_metric(task, data.metric)
    if task.kind == "mlm" and not data.mask:
        raise UserError("data.mask is 0: nothing would be masked or learned; use for example 0.15.")
    return task.model_copy(update=change)


def _own_labels(task: Task, labels: tuple[str, ...]) -> tuple[str, ...]:
    if task.kind not in ("classification", "multilabel"):
        raise UserError(
            f"data.labels names labels, but {task.name} is a {task.kind} task; drop it."
        )
    if len(set(labels)) != len(labels) or len(labels) < (2 if task.kind == "classification" else 1):
        raise UserError(
            f"data.labels is {', '.join(labels)}; wanted at least two names, each once."
        )
    if task.labels is not None and len(labels) != len(task.labels):
        raise UserError(
            f"data.labels names {len(labels)} labels, but {task.name} has {len(task.labels)} "
            f"({', '.join(task.labels)}); drop it, or use task=classification for your own labels."
        )
    return labels


def _own_metric(task: Task, metric: str) -> dict[str, Any]:
    known = KIND_METRICS[task.kind]
    if metric == "perplexity" and task.kind == "mlm":
        raise UserError(
            "data.metric=perplexity cannot rank models, because lower is better; it is reported "
            "anyway. Use data.metric=masked_accuracy."
        )
    if metric not in known:
        raise UserError(
            f"data.metric {metric!r} is not a metric of {task.name}, a {task.kind} task"
            f"{nearest(metric, known)}; known: {', '.join(known)}."
        )
    return {"main": metric, "metrics": tuple(dict.fromkeys((metric, *task.metrics)))}


def row_outputs(task: Task, out: Any, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Reduce a batch's model output to a few numbers a row, small enough to gather from every
    worker.

    Args:
        out: a Hugging Face model output, logits in any floating type on any device.
        batch: what the batcher made, labels included for masked language modelling.

    Returns:
        Arrays whose first dimension is the batch's rows: ``logits [B, C]``; for QA ``starts``,
        ``ends [B, n]`` (token positions inside the context, -1 for none), ``start_logits``,
        ``end_logits [B, n]`` and ``null [B]``, the score of no answer; for masked language
        modelling ``nll``, ``count`` and ``correct [B]``.
    """
    if task.kind == "qa":
        return _qa_outputs(task, out, batch["context_mask"])
    if task.kind == "mlm":
        return _mlm_outputs(out.logits.detach(), batch["labels"])
    return {"logits": out.logits.detach().float().cpu().numpy()}


def _qa_outputs(task: Task, out: Any, context_mask: Tensor) -> dict[str, np.ndarray]:
    start, end = out.start_logits.detach().float(), out.end_logits.detach().float()  # [B, T]
    # [CLS] comes first in every row, and stands for "no answer" as in BERT's own SQuAD 2.0 runs.
    arrays = {"null": (start[:, 0] + end[:, 0]).cpu().numpy()}
    outside = ~context_mask.to(start.device)
    for name, logits in (("start", start), ("end", end)):
        inside = logits.masked_fill(outside, NEVER)
        values, places = inside.topk(min(task.n_best, inside.shape[1]), dim=1)  # [B, n]
        places = places.masked_fill(values <= NEVER, -1)
        missing = task.n_best - values.shape[1]
        pad = torch.nn.functional.pad
        arrays[f"{name}s"] = pad(places, (0, missing), value=-1).int().cpu().numpy()
        arrays[f"{name}_logits"] = pad(values, (0, missing), value=NEVER).cpu().numpy()
    return arrays


def _mlm_outputs(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    rows, places = torch.nonzero(labels != IGNORED, as_tuple=True)
    rows, places = rows.to(logits.device), places.to(logits.device)
    asked = logits[rows, places].float()  # [M, V], the masked tokens of all rows
    wanted = labels.to(logits.device)[rows, places]
    empty = torch.zeros(labels.shape[0], device=logits.device)
    nll = torch.nn.functional.cross_entropy(asked, wanted, reduction="none")
    hit = (asked.argmax(-1) == wanted).float()
    return {
        "nll": empty.index_add(0, rows, nll).cpu().numpy(),
        "count": empty.index_add(0, rows, torch.ones_like(nll)).int().cpu().numpy(),
        "correct": empty.index_add(0, rows, hit).int().cpu().numpy(),
    }


def write_submission(task: Task, predictions: list, path: str | Path) -> Path:
    """Write predictions in the form that the task's leaderboard takes: GLUE's tsv or SQuAD's json.

    Args:
        predictions: as ``raybert.metrics.predictions`` gives them.
        path: the file, or a folder (which may have to be made) in which it gets the leaderboard's
            name.

    Returns:
        The file, which is there whole or not at all.

    Raises:
        UserError: the file is already there.
    """
    path = Path(path).expanduser()
    if path.is_dir() or not path.suffix:
        path = path / (task.submission or "predictions.tsv")
    if path.exists():
        raise UserError(
            f"{path} is already there and is not overwritten; name another file or remove it."
        )
    if task.kind == "qa":
        text = json.dumps(dict(predictions), ensure_ascii=False) + "\n"
    else:
        lines = [f"{row}\t{_cell(task, value)}" for row, value in enumerate(predictions)]
        text = "\n".join(["index\tprediction", *lines]) + "\n"
    write_whole(path, text)
    return path


def _cell(task: Task, value: Any) -> str:
    if task.kind == "regression":
        # STS-B's scale; other regressions are the user's own and have no bounds.
        return f"{min(max(value, 0.0), 5.0):.3f}" if task.glue == "STS-B" else f"{value:.6g}"
    if task.kind == "multilabel":
        return ",".join(value)
    if task.submits_names:
        return str(value)
    return str(own_order(task).index(value))


def own_order(task: Task, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The labels as a task, or a source with ``names`` for its ids, counts them, whatever order
    ``data.labels`` gives those names; other names there are new ones, in the order of the ids."""
    own, labels = names or TASKS[task.name].labels, task.labels or ()
    return own if own and set(own) == set(labels) else labels
