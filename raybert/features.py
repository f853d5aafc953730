"""From standard rows to tokens: classification, regression and masked language modelling (QA has
its own room)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from raybert.config import DataConfig
from raybert.errors import UserError
from raybert.method import Section
from raybert.rows import Rows
from raybert.tasks import Task

T = TypeVar("T")

CHUNK = 2000
"""Rows tokenised at a time; keeps the Python lists of a large data set small."""


class TokenInfo(Section):
    """What batches need to know of the tokenizer, kept beside the tokens so that no worker loads
    it."""

    pad_id: int
    mask_id: int | None
    vocab_size: int
    special_ids: tuple[int, ...]
    token_types: bool


def token_info(tokenizer: Any) -> TokenInfo:
    """Read a tokenizer's special tokens.

    Raises:
        UserError: it has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no padding token, which batches need; use an encoder's (BERT, "
            "RoBERTa) tokenizer."
        )
    return TokenInfo(
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
        token_types="token_type_ids" in tokenizer.model_input_names,
    )


def tokenizer_key(tokenizer: Any) -> str:
    """A digest of everything that decides how the tokenizer cuts text."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by whoever called it last, and set anew by each call.
        content.pop("truncation")
        content.pop("padding")
    else:
        content = tokenizer.get_vocab()
    parts = [
        type(tokenizer).__name__,
        tokenizer.model_input_names,
        tokenizer.special_tokens_map,
        content,
    ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_lengths(task: Task, config: DataConfig, tokenizer: Any) -> None:
    """Refuse a ``data.max_length`` that leaves no room for text, or that the tokenizer's model
    cannot take."""
    special = tokenizer.num_special_tokens_to_add(pair=task.text_pair is not None)
    least = special + (2 if task.text_pair is not None else 1)
    if config.max_length < least:
        raise UserError(
            f"data.max_length={config.max_length} leaves no room for text beside {special} "
            "special tokens; "
            f"use at least {least}, for example 128."
        )
    if config.max_length > tokenizer.model_max_length:
        raise UserError(
            f"data.max_length={config.max_length} is more than the {tokenizer.model_max_length} "
            "tokens that the "
            f"model takes; use data.max_length={tokenizer.model_max_length} or less."
        )
    if task.kind == "mlm" and tokenizer.mask_token_id is None:
        raise UserError(
            "task mlm needs a tokenizer with a mask token; this one has none. Use an encoder's "
            "(BERT, RoBERTa)."
        )


def int_lists(values: list[np.ndarray], kind: pa.DataType) -> pa.Array:
    """Arrays of integers as one Arrow list column, without a Python object for each number."""
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in values], dtype=np.int64)])
    flat = np.concatenate(values) if values else np.zeros(0)
    # Large: a corpus has more tokens than 32 bits can count.
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))


def text_features(task: Task, rows: Rows, config: DataConfig, tokenizer: Any) -> pa.Table:
    """Tokens of single texts or pairs: ``input_ids``, ``token_type_ids`` if any, ``length``,
    ``index``, ``labels``."""
    tables = []
    types = token_info(tokenizer).token_types
    for first in range(0, len(rows["text"]), CHUNK):
        part = slice(first, first + CHUNK)
        pairs = rows["text_pair"][part] if task.text_pair is not None else None
        made = tokenizer(
            rows["text"][part],
            pairs,
            truncation=True,
            max_length=config.max_length,
            return_attention_mask=False,
            return_token_type_ids=types,
        )
        tables.append(token_columns(made["input_ids"], made["token_type_ids"] if types else None))
    table = pa.concat_tables(tables).combine_chunks()
    table = table.append_column("index", pa.array(np.arange(table.num_rows)))
    return table.append_column("labels", _labels(task, rows)) if "label" in rows else table


def token_columns(ids: list, types: list | None) -> pa.Table:
    """``input_ids``, ``length`` and, unless ``None``, ``token_type_ids`` as compact Arrow
    columns."""
    arrays = [np.asarray(row, dtype=np.int32) for row in ids]
    columns = {
        "input_ids": int_lists(arrays, pa.int32()),
        "length": pa.array([len(row) for row in arrays], type=pa.int32()),
    }
    if types is not None:
        columns["token_type_ids"] = int_lists(
            [np.asarray(row, dtype=np.int8) for row in types], pa.int8()
        )
    return pa.table(columns)


def _labels(task: Task, rows: Rows) -> pa.Array:
    if task.kind == "regression":
        return pa.array(rows["label"], type=pa.float32())
    ids = {name: i for i, name in enumerate(task.labels or ())}
    if task.kind == "classification":
        return pa.array([ids[name] for name in rows["label"]], type=pa.int64())
    hot = np.zeros((len(rows["label"]), len(ids)), dtype=np.float32)
    for row, names in enumerate(rows["label"]):
        hot[row, [ids[name] for name in names]] = 1.0
    return pa.FixedSizeListArray.from_arrays(pa.array(hot.ravel()), len(ids)).cast(
        pa.list_(pa.float32())
    )


def mlm_features(texts: Iterable[str], config: DataConfig, tokenizer: Any) -> Iterator[pa.Table]:
    """All texts end to end, cut into rows of ``max_length`` with their special tokens; the last may
    be shorter. Some rows at a time, so that not all texts have to fit into memory."""
    prefix, suffix = _frame(tokenizer)
    room = config.max_length - len(prefix) - len(suffix)
    types = token_info(tokenizer).token_types
    left, count = np.zeros(0, np.int32), 0

    def table(tokens: np.ndarray) -> pa.Table:
        starts = range(0, len(tokens), room)
        ids = [np.concatenate([prefix, tokens[at : at + room], suffix]) for at in starts]
        made = token_columns(ids, [np.zeros(len(row), np.int8) for row in ids] if types else None)
        index = pa.array(np.arange(count, count + made.num_rows))
        return made.append_column("index", index)

    for some in batched(texts, CHUNK):
        made = tokenizer(
            some,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens = np.concatenate([left, *(np.asarray(i, np.int32) for i in made["input_ids"])])
        whole = len(tokens) - len(tokens) % room
        yield table(tokens[:whole])
        count, left = count + whole // room, tokens[whole:]
    yield table(left)


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` values; the last may be shorter."""
    values = iter(values)
    while some := list(itertools.islice(values, size)):
        yield some


def _frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return np.asarray(full[:at], np.int32), np.asarray(full[at + len(bare) :], np.int32)
