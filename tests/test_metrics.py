"""Scores against numbers worked out by hand or by SciPy and scikit-learn's definitions."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tokenizer
from scipy import stats

from raybert.config import DataConfig
from raybert.data import TaskData, prepare
from raybert.metrics import floor, predictions, score


@pytest.fixture
def make(tmp_path: Path):
    """Task data whose train and dev rows have the given labels."""

    def build(name: str, given: list[str], **data) -> TaskData:
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "".join(f"good,{v}\n" for v in given))
        files = {"train": str(path), "dev": str(path), "cache": str(tmp_path / "cache")}
        config = DataConfig.model_validate({**files, "text": "text", **data})
        return prepare(name, config, make_tokenizer(), ("train", "dev"))

    return build


def one_hot(guesses: list[int], classes: int) -> dict[str, np.ndarray]:
    return {"logits": np.eye(classes, dtype=np.float32)[guesses]}


def test_binary_metrics(make) -> None:
    data = make("cola", ["1", "1", "1", "0", "0", "1"], metric="f1")
    # By label and guess: three hits, one miss, one false alarm, one right refusal.
    outputs = one_hot([1, 1, 0, 0, 1, 1], 2)
    scores = score(data.task, data, "dev", np.arange(6), outputs)
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert scores["matthews"] == pytest.approx((3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2))
    zero = floor(data.task, data, "dev")
    assert zero["f1"] == pytest.approx(2 * 4 / (2 * 4 + 2))
    assert zero["matthews"] == 0.0


def test_constant_guesses_have_no_correlation(make) -> None:
    data = make("cola", ["1", "1", "0"])
    assert score(data.task, data, "dev", np.arange(3), one_hot([1, 1, 1], 2)) == {"matthews": 0.0}
    data = make("stsb", ["1", "2", "4"], text_pair="text")
    flat = {"logits": np.ones((3, 1), np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of the missing variance
        assert set(score(data.task, data, "dev", np.arange(3), flat).values()) == {0.0}


def test_rows_may_come_in_any_order(make) -> None:
    data = make("classification", ["a", "b", "c", "a"])
    index = np.array([2, 0, 3, 1])
    outputs = one_hot([2, 0, 1, 1], 3)
    scores = score(data.task, data, "dev", index, outputs)
    assert scores["accuracy"] == pytest.approx(0.75)
    # a: 1 of 2 found, no false alarm; b: found, one false alarm; c: found.
    assert scores["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert predictions(data.task, data, "dev", index, outputs) == ["a", "b", "c", "b"]
    assert floor(data.task, data, "dev")["accuracy"] == pytest.approx(0.5)


def test_correlations_match_scipy(make) -> None:
    labels = [0.0, 1.5, 1.5, 3.0, 5.0, 4.5]
    guesses = np.array([[0.3], [1.0], [2.5], [2.5], [4.0], [4.9]], np.float32)
    data = make("regression", [str(v) for v in labels])
    scores = score(data.task, data, "dev", np.arange(6), {"logits": guesses})
    assert scores["pearson"] == pytest.approx(stats.pearsonr(guesses[:, 0], labels)[0], abs=1e-5)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(guesses[:, 0], labels)[0], abs=1e-5)
    assert floor(data.task, data, "dev") == {"pearson": 0.0, "spearman": 0.0}


def test_multilabel(make) -> None:
    data = make("multilabel", ["a;b", "a", "c", "a"], separator=";")
    logits = np.array([[1, 1, -1], [1, -1, 1], [-1, -1, 1], [-1, -1, -1]], np.float32)
    scores = score(data.task, data, "dev", np.arange(4), {"logits": logits})
    # Four hits, one false alarm, one miss; two rows wholly right.
    assert scores == pytest.approx({"f1": 2 * 4 / (2 * 4 + 2), "accuracy": 0.5})
    said = predictions(data.task, data, "dev", np.arange(4), {"logits": logits})
    assert said == [["a", "b"], ["a", "c"], ["c"], []]
    # Everybody is "a": three hits, one false alarm, two misses; rows 2 and 4 wholly right.
    assert floor(data.task, data, "dev") == pytest.approx({"f1": 6 / 9, "accuracy": 0.5})


def test_a_single_label_is_scored_like_several(make) -> None:
    data = make("multilabel", ["spam", "", "spam", ""], separator=";")
    logits = np.array([[1], [1], [-1], [-1]], np.float32)
    scores = score(data.task, data, "dev", np.arange(4), {"logits": logits})
    assert scores == pytest.approx({"f1": 2 * 1 / (2 * 1 + 2), "accuracy": 0.5})


def test_the_positive_class_is_the_tasks_second_wherever_the_model_has_it(make) -> None:
    rows = ["1", "1", "1", "0", "0", "1"]
    names = ["acceptable", "unacceptable"]
    turned = make("cola", rows, metric="f1", labels=names)
    assert turned.task.labels == tuple(names)
    scores = score(turned.task, turned, "dev", np.arange(6), one_hot([0, 0, 1, 1, 0, 0], 2))
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert floor(turned.task, turned, "dev")["f1"] == pytest.approx(2 * 4 / (2 * 4 + 2))


def test_mlm(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the film was good and the plot was the film\n" * 40)
    options = {"train": str(path), "dev": str(path), "max_length": 16, "cache": str(tmp_path / "c")}
    data = prepare("mlm", DataConfig.model_validate(options), make_tokenizer(), ("dev",))
    n = len(data.splits["dev"])
    outputs = {
        "nll": np.full(n, 3.0, np.float32),
        "count": np.full(n, 2, np.int32),
        "correct": np.arange(n) % 2,
    }
    scores = score(data.task, data, "dev", np.arange(n), outputs)
    assert scores["perplexity"] == pytest.approx(np.exp(1.5))
    assert scores["masked_accuracy"] == pytest.approx(np.sum(np.arange(n) % 2) / (2 * n))
    zero = floor(data.task, data, "dev")
    # Three words in ten are "the"; six different words.
    assert zero["masked_accuracy"] == pytest.approx(0.3, abs=0.12)
    assert 1 < zero["perplexity"] < 6


def test_duplicated_or_missing_rows_are_errors(make) -> None:
    data = make("classification", ["a", "b", "a"])
    with pytest.raises(ValueError, match="each wanted once"):
        score(data.task, data, "dev", np.array([0, 1, 1]), one_hot([0, 1, 1], 2))
    with pytest.raises(ValueError, match="each wanted once"):
        score(data.task, data, "dev", np.array([0, 1]), one_hot([0, 1], 2))


def test_mrpc_floor_is_the_published_majority(shared_data: Path, tmp_path: Path) -> None:
    options = {"source": str(shared_data / "glue" / "MRPC"), "cache": str(tmp_path)}
    data = prepare("mrpc", DataConfig.model_validate(options), make_tokenizer(), ("dev",))
    zero = floor(data.task, data, "dev")
    assert round(zero["f1"], 3) == 0.812
    assert round(zero["accuracy"], 3) == 0.684
