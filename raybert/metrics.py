"""Scores of a whole split, what a constant predictor would score on it, and predictions in
words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_accuracy,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.text.squad import squad

from raybert.data import TaskData
from raybert.qa import best_answers
from raybert.tasks import IGNORED, Task, own_order

Outputs = dict[str, np.ndarray]

CORRELATIONS = {"matthews", "pearson", "spearman"}


def score(
    task: Task, data: TaskData, split: str, index: np.ndarray, outputs: Outputs
) -> dict[str, float]:
    """The task's metrics over a whole labelled split.

    Args:
        index: the ``index`` column of each row (for QA of each window), [N], in any order.
        outputs: ``raybert.tasks.row_outputs`` of the same rows, each array [N, ...].

    Returns:
        Metrics by name, as fractions of 1 (perplexity apart). SQuAD 2.0 also has ``best_f1``,
        ``best_em`` and ``best_f1_threshold``: the scores, had "no answer" been said wherever its
        score exceeds the answer's by the threshold that suits these rows best.

    Raises:
        ValueError: a row is missing or there twice, or the split has no labels.
    """
    outputs = _in_order(data, split, index, outputs)
    _need_labels(data, split)
    if task.kind == "qa":
        return _qa_scores(task, data, split, outputs)
    if task.kind == "mlm":
        return _mlm_scores(outputs)
    labels = _labels(data, split)
    if task.kind == "regression":
        return _named(task, torch.from_numpy(outputs["logits"][:, 0]), labels)
    if task.kind == "multilabel":
        return _named(task, torch.from_numpy((outputs["logits"] > 0).astype(np.int64)), labels)
    return _named(task, torch.from_numpy(outputs["logits"].argmax(1)), labels)


def floor(task: Task, data: TaskData, split: str) -> dict[str, float]:
    """What a predictor that always answers the same scores on the split: the metrics' zero point.

    Returns:
        The metrics of ``score``: for the most frequent class of these rows; no correlation (0); no
        answer; or the most frequent masked token, and the perplexity of the masked tokens' own
        frequencies.
    """
    _need_labels(data, split)
    if task.kind == "regression":
        return dict.fromkeys(task.metrics, 0.0)
    if task.kind == "qa":
        share = sum(not gold for gold in _gold(task, data, split)) / len(data.rows[split])
        return dict.fromkeys(task.metrics, share)
    if task.kind == "mlm":
        return _mlm_floor(data, split)
    labels = _labels(data, split)
    if task.kind == "multilabel":
        constant = (labels.float().mean(0) > 0.5).long().expand_as(labels)
    else:
        constant = torch.full_like(labels, int(torch.bincount(labels).argmax()))
    return _named(task, constant, labels)


def predictions(
    task: Task, data: TaskData, split: str, index: np.ndarray, outputs: Outputs
) -> list:
    """What the model says of each row, in the rows' order.

    Returns:
        Label names; numbers; lists of label names; or, for QA, pairs of the question's id and the
        answer.

    Raises:
        ValueError: a row is missing or there twice, or the task (mlm) has no predictions a row.
    """
    outputs = _in_order(data, split, index, outputs)
    if task.kind == "qa":
        answers, excess = _answers(task, data, split, outputs)
        if task.no_answer:
            answers = [a if e <= 0 else "" for a, e in zip(answers, excess, strict=True)]
        return list(zip(data.rows[split]["id"], answers, strict=True))
    if task.kind == "mlm":
        raise ValueError("masked language modelling has no predictions a row")
    if task.kind == "regression":
        return outputs["logits"][:, 0].tolist()
    names = task.labels or ()
    if task.kind == "multilabel":
        return [[names[i] for i in np.flatnonzero(row > 0)] for row in outputs["logits"]]
    return [names[i] for i in outputs["logits"].argmax(1)]


def _in_order(data: TaskData, split: str, index: np.ndarray, outputs: Outputs) -> Outputs:
    """Outputs by row. A row gathered twice or lost would bend every metric a little, unseen."""
    count = len(data.splits[split])
    order = np.argsort(index, kind="stable")
    if not np.array_equal(np.asarray(index)[order], np.arange(count)):
        raise ValueError(
            f"the {split} split has {count} rows, each wanted once; found {len(index)} outputs of "
            f"{len(np.unique(index))} different rows"
        )
    return {name: array[order] for name, array in outputs.items()}


def _need_labels(data: TaskData, split: str) -> None:
    if split == "test":
        raise ValueError("the test split has no labels to score against; use predictions()")


def _labels(data: TaskData, split: str) -> torch.Tensor:
    labels = torch.from_numpy(data.batcher(split).columns["labels"].copy())  # [N] or [N, C]
    return labels.long() if data.task.kind == "multilabel" else labels


def _named(task: Task, guesses: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """The task's metrics of guesses (class ids, numbers or 0/1 rows) against labels, both [N] or
    [N, C]."""
    known: dict[str, Any]
    if task.kind == "regression":
        known = {"pearson": pearson_corrcoef, "spearman": spearman_corrcoef}
    elif task.kind == "multilabel":
        known = {  # for a single label too, of which torchmetrics knows no multilabel ones
            "f1": lambda g, t: binary_f1_score(g.flatten(), t.flatten()),  # micro
            "accuracy": lambda g, t: (g == t).all(1).float().mean(),
        }
    else:
        c = task.num_labels
        # The task's second label, wherever data.labels has put it.
        positive = (task.labels or ()).index(own_order(task)[1])
        known = {
            "accuracy": lambda g, t: multiclass_accuracy(g, t, c, average="micro"),
            "matthews": lambda g, t: multiclass_matthews_corrcoef(g, t, c),
            "f1": (lambda g, t: binary_f1_score(g == positive, t == positive))
            if c == 2
            else lambda g, t: multiclass_f1_score(g, t, c, average="macro"),
        }
    scores = {name: float(known[name](guesses, labels)) for name in task.metrics}
    # A correlation with a constant is undefined, and torchmetrics' answer NaN or arbitrary: guesses
    # that never differ tell nothing of the rows.
    constant = min(len(torch.unique(guesses)), len(torch.unique(labels))) < 2
    for name in CORRELATIONS & scores.keys():
        if constant or math.isnan(scores[name]):
            scores[name] = 0.0
    return scores


def _mlm_scores(outputs: Outputs) -> dict[str, float]:
    count = int(outputs["count"].sum())
    nll = float(outputs["nll"].astype(np.float64).sum()) / count
    # Past e^700 a float overflows; such a model has diverged anyway.
    return {
        "masked_accuracy": int(outputs["correct"].sum()) / count,
        "perplexity": math.exp(min(nll, 700.0)),
    }


def _mlm_floor(data: TaskData, split: str) -> dict[str, float]:
    batcher = data.batcher(split)
    counts = np.zeros(data.tokens.vocab_size)
    for first in range(0, len(batcher), 256):
        labels = batcher(np.arange(first, min(first + 256, len(batcher))))["labels"].numpy()
        counts += np.bincount(labels[labels != IGNORED], minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return {
        "masked_accuracy": float(share.max()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def _gold(task: Task, data: TaskData, split: str) -> list[list[str]]:
    """The accepted answers of each question; none where the question has no answer."""
    texts = [answers["text"] for answers in data.rows[split]["answers"]]
    if not task.no_answer:
        return texts
    # As the official 2.0 script does, an answer of nothing but articles and punctuation is no
    # answer.
    return [[t for t in golds if _exact(t, "") == 0] for golds in texts]


def _exact(first: str, second: str) -> float:
    return _squad([("0", first)], [("0", [second])])[0]


def _squad(
    answers: list[tuple[str, str]], gold: list[tuple[str, list[str]]]
) -> tuple[float, float]:
    """(EM, F1) of answers by id, as fractions."""
    result = squad(
        [{"id": name, "prediction_text": text} for name, text in answers],  # type: ignore[arg-type]
        [{"id": name, "answers": {"text": texts}} for name, texts in gold],  # type: ignore[arg-type]
    )
    return float(result["exact_match"]) / 100, float(result["f1"]) / 100


def _answers(
    task: Task, data: TaskData, split: str, outputs: Outputs
) -> tuple[list[str], np.ndarray]:
    table: Any = data.splits[split].with_format("arrow")[:]
    windows = {
        "row": table["row"].to_numpy(),
        "context_start": table["context_start"].to_numpy(),
        "offsets": [np.asarray(o.values).reshape(-1, 2) for o in table["offsets"]],
    }
    return best_answers(outputs, windows, list(data.rows[split]["context"]), task.max_answer)


def _qa_scores(task: Task, data: TaskData, split: str, outputs: Outputs) -> dict[str, float]:
    answers, excess = _answers(task, data, split, outputs)
    ids = [str(i) for i in range(len(answers))]
    gold = _gold(task, data, split)
    if not task.no_answer:
        em, f1 = _squad(list(zip(ids, answers, strict=True)), list(zip(ids, gold, strict=True)))
        return {"em": em, "f1": f1}
    # [R, 2]: EM and F1 of each question if it is answered, and if it is not.
    said = np.array(
        [_squad([("0", a)], [("0", g or [""])]) for a, g in zip(answers, gold, strict=True)]
    )
    silent = np.array([[float(not g)] * 2 for g in gold])
    em, f1 = np.where((excess > 0)[:, None], silent, said).mean(0)
    best = [_best_threshold(said[:, k], silent[:, k], excess) for k in (0, 1)]
    return {
        "em": float(em),
        "f1": float(f1),
        "best_em": best[0][0],
        "best_f1": best[1][0],
        "best_f1_threshold": best[1][1],
    }


def _best_threshold(
    said: np.ndarray, silent: np.ndarray, excess: np.ndarray
) -> tuple[float, float]:
    """The highest mean score, and the threshold on ``excess`` [R] up to which questions are then
    answered."""
    order = np.argsort(excess, kind="stable")
    # totals[k]: the k questions with the least excess are answered, the others are not.
    totals = silent.sum() + np.concatenate([[0.0], np.cumsum((said - silent)[order])])
    # Only between different values of excess can a threshold fall.
    ordered = excess[order]
    cut = np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])
    k = int(np.where(cut, totals, -np.inf).argmax())
    threshold = float(ordered[k - 1]) if k else float(ordered[0]) - 1.0
    return float(totals[k] / len(said)), threshold
