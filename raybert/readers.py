"""File formats: from a path to named columns whose rows can be pointed at in an error."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from raybert.errors import UserError
from raybert.explain import nearest

# A whole document in one cell is ordinary here; the module's own bound is 128 KiB. A C long holds
# 2^31-1 anywhere.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

GLUE_COLUMNS: dict[str, tuple[str, str | None, str]] = {
    "CoLA": ("sentence", None, "label"),
    "SST-2": ("sentence", None, "label"),
    "MRPC": ("#1 String", "#2 String", "Quality"),
    "STS-B": ("sentence1", "sentence2", "score"),
    "QQP": ("question1", "question2", "is_duplicate"),
    "MNLI": ("sentence1", "sentence2", "gold_label"),
    "QNLI": ("question", "sentence", "label"),
    "RTE": ("sentence1", "sentence2", "label"),
    "WNLI": ("sentence1", "sentence2", "label"),
}
"""Headers of text, second text and label in GLUE's official tsv files."""

COLA_HEADER = ["source", "label", "mark", "sentence"]
"""CoLA's train and dev files have no header; these are its columns."""


DAMAGED = ("QQP",)
"""Tasks whose official files of labelled rows have lines that were cut in two."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Raw:
    """Rows as a source holds them.

    Attributes:
        columns: values by column name, equally long: lists, but for a text file's lines and, where
            they are a corpus, a data set's texts.
        origin: the file, folder or data set, as an error should name it.
        places: what an error calls each row, after the origin, or what tells it; nothing: ``row 1``
            and so on.
        label_names: label names by id, where the source knows them.
    """

    columns: dict[str, Any]
    origin: str
    places: Sequence[str] | Callable[[int], str] | None = None
    label_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, row: int) -> str:
        """The row's place in words, for an error."""
        if self.places is None:
            place = f"row {row + 1}"
        else:
            place = self.places(row) if callable(self.places) else self.places[row]
        return f"{self.origin}, {place}"

    def column(self, name: str, key: str) -> Any:
        """The values of a column; ``key`` is the recipe's key that names it."""
        if name not in self.columns:
            raise UserError(
                f"{self.origin} has no column {name!r}{nearest(name, self.columns)}; its columns "
                f"are {', '.join(map(str, self.columns)) or 'none'}. Name the right one with "
                f"{key}=COLUMN."
            )
        return self.columns[name]


def read_file(path: Path, *, qa: bool = False) -> Raw:
    """Read a csv, tsv, jsonl, json, parquet or txt file; for QA, json is SQuAD's nested form.

    Raises:
        UserError: the file is missing, of another kind, or broken; the line is named where there is
            one.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}.")
    readers: dict[str, Callable[[Path], Raw]] = {
        ".csv": read_csv,
        ".tsv": read_tsv,
        ".jsonl": read_jsonl,
        ".parquet": _read_parquet,
        ".txt": _read_text,
        ".json": read_squad if qa else _read_json,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is not a file that can be read; wanted {', '.join(readers)}.")
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.")


def _table(
    path: Path,
    lines: Iterator[tuple[int, list[str]]],
    header: list[str] | None,
    *,
    damaged: bool = False,
) -> Raw:
    """Lines of cells as columns; each must be as wide as the header, unless ``damaged`` lines are
    known to be there, which are left out."""
    if header is None:
        header = next(lines, (0, []))[1]
    if not header:
        raise UserError(f"{path} is empty; wanted a header line and rows.")
    if len(set(header)) != len(header):
        raise UserError(f"{path} names a column twice: {', '.join(header)}. Rename one of them.")
    columns: dict[str, list] = {name: [] for name in header}
    places, left_out = [], []
    for number, cells in lines:
        if damaged and len(cells) != len(header):
            left_out.append(number)
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns, wanted {len(header)} "
                f"({', '.join(header)}); "
                "mend or remove that line."
            )
        for name, cell in zip(header, cells, strict=True):
            columns[name].append(cell)
        places.append(f"line {number}")
    if left_out:
        log.warning(
            "%s: %d lines have other than %d columns and are left out, the first is line %d",
            *(path, len(left_out), len(header), left_out[0]),
        )
    return Raw(columns, str(path), places)


def read_tsv(path: Path, header: list[str] | None = None, *, damaged: bool = False) -> Raw:
    """Tab-separated rows. A quote is an ordinary character, as in GLUE's files, and a row never
    spans lines.

    Args:
        header: the columns' names, where the first line has none.
        damaged: lines of another width are left out, rather than refused.
    """

    def lines() -> Iterator[tuple[int, list[str]]]:
        # Only a line feed ends a row: other Unicode line ends occur inside sentences.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip("\r\n"):
                    yield number, line.rstrip("\r\n").split("\t")

    return _table(path, lines(), header, damaged=damaged)


def read_csv(path: Path) -> Raw:
    """Comma-separated rows with a header; a quoted cell may hold commas and line ends."""

    def lines() -> Iterator[tuple[int, list[str]]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            while True:
                first = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise UserError(f"{path}, line {first}: {error}; mend that line.") from None
                if cells:
                    yield first, cells

    return _table(path, lines(), None)


def read_jsonl(path: Path) -> Raw:
    """One JSON object a line."""
    records, places = [], []
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}).") from None
            places.append(f"line {number}")
    return _records(path, records, places)


def _read_json(path: Path) -> Raw:
    records = _load_json(path)
    if not isinstance(records, list):
        raise UserError(
            f"{path} holds a {type(records).__name__}; wanted a list of objects, one a row."
        )
    return _records(path, records, None)


def _records(path: Path, records: list, places: list[str] | None) -> Raw:
    """Objects as columns. A key that an object lacks reads as missing there."""
    names: dict[str, None] = {}
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            place = places[row] if places else f"row {row + 1}"
            raise UserError(f"{path}, {place}: wanted an object, found {str(record)[:60]!r}.")
        names |= dict.fromkeys(record)
    columns = {name: [record.get(name) for record in records] for name in names}
    return Raw(columns, str(path), places)


def _read_parquet(path: Path) -> Raw:
    try:
        table = pyarrow.parquet.read_table(path)
        columns = table.to_pydict()
    # Damaged pages raise half of Python's own errors, beside Arrow's.
    except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is not readable as Parquet: {error}.") from None
    return Raw(columns, str(path))


class TextLines:
    """The lines of a text file that are not blank, which are read anew each time they are gone
    through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = sum(1 for _ in self.numbered())

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        return (line for _, line in self.numbered())

    def numbered(self) -> Iterator[tuple[int, str]]:
        """With their numbers in the file, from 1."""
        with self.path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if text := line.strip():
                    yield number, text

    def place(self, row: int) -> str:
        """What an error calls one of them."""
        number, _ = next(itertools.islice(self.numbered(), row, None))
        return f"line {number}"


def _read_text(path: Path) -> Raw:
    lines = TextLines(path)
    return Raw({"text": lines}, str(path), lines.place)


def _load_json(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # too long a number, brackets by the thousand
        raise UserError(f"{path}: not JSON ({error}).") from None


def read_squad(path: Path) -> Raw:
    """SQuAD's nested json as columns ``id``, ``question``, ``context``, ``answers`` (the Hub's
    form, or ``None``)."""
    names = ("id", "question", "context", "answers")
    columns: dict[str, list] = {name: [] for name in names}
    try:
        for article in _load_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    values = (question["id"], question["question"], paragraph["context"])
                    for name, value in zip(names, (*values, _squad_answers(question)), strict=True):
                        columns[name].append(value)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not laid out as SQuAD json (data > paragraphs > context, qas > id, "
            "question, answers): "
            f"{type(error).__name__} at {error}."
        ) from None
    return Raw(columns, str(path), [f"question {name}" for name in columns["id"]])


def _squad_answers(question: dict[str, Any]) -> dict[str, list] | None:
    if question.get("is_impossible"):
        return {"text": [], "answer_start": []}
    if "answers" not in question:
        return None
    return {key: [a[key] for a in question["answers"]] for key in ("text", "answer_start")}


def read_glue(folder: Path, layout: str, split: str) -> Raw:
    """One split of a GLUE task's official folder; ``split`` is the file's name without ``.tsv``."""
    path = folder / f"{split}.tsv"
    labelled = split != "test"
    header = COLA_HEADER if layout == "CoLA" and labelled else None
    try:
        return read_tsv(path, header, damaged=layout in DAMAGED and labelled)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def read_acl_imdb(folder: Path) -> Raw:
    """One split of the aclImdb folder: a review a file under ``neg`` and ``pos``."""
    files = [(p, side) for side in ("neg", "pos") for p in sorted((folder / side).glob("*.txt"))]
    texts = []
    for path, _ in files:
        try:
            texts.append(path.read_text(encoding="utf-8").replace("<br />", " "))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None
    columns: dict[str, list] = {"text": texts, "label": [side for _, side in files]}
    return Raw(columns, str(folder), [f"{side}/{path.name}" for path, side in files])
