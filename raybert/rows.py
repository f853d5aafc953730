"""From a source's columns to the standard ones of each kind of task, every value checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raybert.config import DataConfig
from raybert.errors import TransientError, UserError
from raybert.explain import nearest
from raybert.readers import Raw
from raybert.tasks import Task, own_order

Rows = dict[str, Any]
"""Standard columns, lists: ``text``, ``text_pair`` and ``label`` (names, numbers or lists of
names); for QA ``id``, ``question``, ``context`` and ``answers``. For masked language modelling
``text``, as `Texts`."""


@dataclass(frozen=True)
class Texts:
    """The texts of a corpus, which are read anew each time they are gone through: there may be more
    than fit into memory.

    Attributes:
        raw: the rows.
        values: their texts, as the source has them: any number of times, and their number is known.
        chosen: which of the rows are meant [N]; all.
    """

    raw: Raw
    values: Any
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values) if self.chosen is None else int(self.chosen.sum())

    def __iter__(self) -> Iterator[str]:
        try:
            for row, value in enumerate(self.values):
                if self.chosen is None or self.chosen[row]:
                    yield "" if value is None else _text(self.raw, row, value)
        except OSError as error:  # the source's: what is made of the texts may fail too
            raise TransientError(
                f"{self.raw.origin} cannot be read: {error.strerror or error}."
            ) from None

    def take(self, positions: np.ndarray) -> Texts:
        """Those at ``positions``, in the order in which they are read."""
        places = np.arange(len(self)) if self.chosen is None else np.flatnonzero(self.chosen)
        chosen = np.zeros(len(self.values), dtype=bool)
        chosen[places[positions]] = True
        return replace(self, chosen=chosen)


def refuse_empty(raw: Raw, split: str) -> None:
    """Refuse a split without a row."""
    if not len(raw):
        raise UserError(f"{raw.origin} has no rows for the {split} split; give it at least one.")


def standard_rows(task: Task, raw: Raw, split: str, config: DataConfig) -> Rows:
    """Check a split's rows and give them their standard columns. The test split has no labels.

    Args:
        task: with its labels known, where it has any.

    Raises:
        UserError: a column is missing or empty, or a value does not fit; the row is named.
    """
    if task.kind == "qa":
        return _qa_rows(task, raw, split)
    if task.kind == "mlm":
        texts = Texts(raw, raw.column(task.text, "data.text"))
        _refuse_blank(raw, texts, task.text, "data.text")
        return {"text": texts}
    rows: Rows = {"text": _texts(raw, task.text, "data.text")}
    if task.text_pair is not None:
        rows["text_pair"] = _texts(raw, task.text_pair, "data.text_pair")
    if split != "test":
        values = raw.column(task.label, "data.label")
        rows["label"] = [_label(task, raw, row, value, config) for row, value in enumerate(values)]
    return rows


def found_labels(task: Task, raw: Raw, config: DataConfig) -> tuple[str, ...]:
    """The label names of a user's rows: the source's own, else those that occur, sorted (as numbers
    when all are)."""
    if raw.label_names is not None:
        return raw.label_names
    values = raw.column(task.label, "data.label")
    if task.kind == "multilabel":
        names = {_word(part) for value in values for part in _parts(value, config.separator)}
    else:
        names = {_word(value) for value in values} - {""}
    # Twice, so that 1 and 1.0 have an order too.
    ordered = sorted(names)
    if all(is_number(name) for name in names):
        ordered = sorted(ordered, key=float)
    if task.kind == "classification" and len(ordered) < 2:
        raise UserError(
            f"{raw.origin}: column {task.label!r} holds {len(ordered)} class(es) "
            f"({', '.join(ordered) or 'none'}); wanted at least two. Is data.label the right "
            "column?"
        )
    if task.kind == "classification" and len(ordered) > 1000:
        raise UserError(
            f"{raw.origin}: column {task.label!r} holds {len(ordered)} different values, too many "
            "for classes; "
            "is data.label the right column, or is this task=regression?"
        )
    if not ordered:
        raise UserError(f"{raw.origin}: column {task.label!r} names no label in any row.")
    return tuple(ordered)


def check_classes(task: Task, rows: Rows, origin: str) -> None:
    """Refuse training rows that show a single class: there is nothing to learn from them."""
    if task.kind == "classification" and len(set(rows["label"])) < 2:
        raise UserError(
            f"{origin}: every training row has the label {rows['label'][0]!r}; wanted rows of at "
            "least two of "
            f"{', '.join(task.labels or ())}."
        )


def take(rows: Rows, positions: np.ndarray) -> Rows:
    """The rows at ``positions``, in that order, but for a corpus, which keeps its own."""
    return {
        name: values.take(positions)
        if isinstance(values, Texts)
        else [values[i] for i in positions]
        for name, values in rows.items()
    }


def _texts(raw: Raw, name: str, key: str) -> list[str]:
    texts = list(Texts(raw, raw.column(name, key)))
    _refuse_blank(raw, texts, name, key)
    return texts


def _refuse_blank(raw: Raw, texts: Iterable[str], name: str, key: str) -> None:
    if not any(text.strip() for text in texts):
        raise UserError(
            f"{raw.origin}: column {name!r} is empty in every row; name another with {key}=COLUMN."
        )


def _text(raw: Raw, row: int, value: Any) -> str:
    """A cell as text that can be written as UTF-8; JSON may hold halves of a character."""
    _refuse_compound(raw, row, value)
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{raw.where(row)}: {text[error.start]!r} is half of a character (a lone surrogate), "
            "which no text file may hold; mend or remove that row."
        ) from None
    return text


def _refuse_compound(raw: Raw, row: int, value: Any) -> None:
    """Refuse what would become text as Python writes it."""
    if isinstance(value, (bytes, list, dict)):
        kind = {"bytes": "raw bytes", "list": "a list", "dict": "a record"}[type(value).__name__]
        raise UserError(
            f"{raw.where(row)}: {str(value)[:60]} is {kind}, not text. Convert the column to "
            "text, or name another."
        )


def is_number(word: str) -> bool:
    """Whether a label is written as a number, which says nothing of its id."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _word(value: Any) -> str:
    """A label as text; pandas writes whole numbers as 1.0 when a column once had a gap, which is no
    label."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _parts(value: Any, separator: str) -> list[Any]:
    """The labels of a row, those that are empty left out."""
    values = value if isinstance(value, list) else _word(value).split(separator)
    return [part for part in values if _word(part)]


def _label(task: Task, raw: Raw, row: int, value: Any, config: DataConfig) -> Any:
    if task.kind == "regression":
        return _number(task, raw, row, value)
    if task.kind == "multilabel":
        return [_name(task, raw, row, part) for part in _parts(value, config.separator)]
    return _name(task, raw, row, value)


def _name(task: Task, raw: Raw, row: int, value: Any) -> str:
    """A label given by name, or by its id where no label has that name."""
    _refuse_compound(raw, row, value)
    labels, word = task.labels or (), _word(value)
    # Where a source has names for its ids, a number is an id, even if a name looks like it.
    is_id = raw.label_names is not None and isinstance(value, int)
    if word in labels and not is_id:
        return word
    name = _by_id(task, raw, word)
    if name is not None:
        return name
    raise UserError(
        f"{raw.where(row)}: {word!r} is not a label of {task.name}{nearest(word, labels)}; known: "
        f"{', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}. Mend the row, or name "
        "the column "
        "with data.label or the labels with data.labels."
    )


def _by_id(task: Task, raw: Raw, word: str) -> str | None:
    """The label that an id stands for: ids count in the source's order, and ``data.labels``, if it
    holds the same names, says only in which order the model has them."""
    order, known = own_order(task, raw.label_names), len(raw.label_names or task.labels or ())
    if not (word.isdecimal() and len(word) < 10 and int(word) < min(len(order), known)):
        return None
    if raw.label_names is None and any(map(is_number, order)):
        return None  # a number that no label is, among labels that are numbers
    return order[int(word)]


def _number(task: Task, raw: Raw, row: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{raw.where(row)}: {value!r} in column {task.label!r} is not a number, which a "
            "regression "
            "label must be; mend the row, or name the column with data.label."
        )
    return number


def _qa_rows(task: Task, raw: Raw, split: str) -> Rows:
    rows: Rows = {
        "id": [_text(raw, row, v) for row, v in enumerate(raw.column("id", "data"))],
        "question": _texts(raw, task.text, "data.text"),
        "context": _texts(raw, task.text_pair or "context", "data.text_pair"),
    }
    seen: set[str] = set()
    for row, name in enumerate(rows["id"]):
        if name in seen:
            raise UserError(
                f"{raw.where(row)}: the id {name!r} occurs twice; each question needs its own."
            )
        seen.add(name)
        if not rows["context"][row].strip() or not rows["question"][row].strip():
            raise UserError(
                f"{raw.where(row)}: the question or its context is empty; mend or remove it."
            )
    if split != "test":
        answers = raw.column(task.label, "data.label")
        rows["answers"] = [
            _answers(task, raw, row, value, rows["context"][row])
            for row, value in enumerate(answers)
        ]
    return rows


def _answers(task: Task, raw: Raw, row: int, value: Any, context: str) -> dict[str, list]:
    """The answers of one question, each standing in the context at its start (moved to the nearest
    place)."""
    try:
        pairs = list(zip(value["text"], value["answer_start"], strict=True))
        pairs = [(str(text), int(start)) for text, start in pairs]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise UserError(
            f"{raw.where(row)}: answers are {str(value)[:80]!r}; wanted lists `text` and "
            "`answer_start` of one length."
        ) from None
    if not pairs and not task.no_answer:
        raise UserError(
            f"{raw.where(row)}: the question has no answer, which {task.name} (SQuAD 1.1) does "
            "not know; "
            "use task=squad2, or remove the question."
        )
    return {
        "text": [text for text, _ in pairs],
        "answer_start": [_place(raw, row, context, text, start) for text, start in pairs],
    }


def _place(raw: Raw, row: int, context: str, text: str, start: int) -> int:
    if text and context.startswith(text, max(start, 0)) and start >= 0:
        return start
    places = []
    at = context.find(text) if text else -1
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    if not places:
        raise UserError(
            f"{raw.where(row)}: the answer {text[:60]!r} (answer_start {start}) does not occur in "
            "its context; "
            "an answer must be a part of it, letter by letter."
        )
    # Offsets counted in bytes, or before a text was cleaned, are off by a few characters.
    return min(places, key=lambda place: abs(place - start))
