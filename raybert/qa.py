"""Extractive QA: long contexts as overlapping windows, and windows' candidates as answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raybert.config import DataConfig
from raybert.errors import UserError
from raybert.features import int_lists, token_columns, token_info
from raybert.rows import Rows
from raybert.tasks import NEVER

MAX_QUESTION = 64
"""Tokens of a question that are kept, as in BERT's own SQuAD runs."""

_LEAST_QUESTION = 8
_CHUNK = 500


def question_room(config: DataConfig, tokenizer: Any) -> int:
    """Tokens that a question may keep so that every window moves on by at least as much as a
    question takes.

    Raises:
        UserError: ``data.stride`` leaves the windows no room to move on.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = min(MAX_QUESTION, (config.max_length - special - config.stride) // 2)
    if room < _LEAST_QUESTION:
        most = config.max_length - special - 2 * _LEAST_QUESTION
        raise UserError(
            f"data.stride={config.stride} leaves a window of data.max_length={config.max_length} "
            "tokens no room for "
            f"a question and new context; use data.stride={max(most, 0)} or less, or a larger "
            "data.max_length "
            "(384 with stride 128 is usual)."
        )
    return room


def qa_features(rows: Rows, config: DataConfig, tokenizer: Any) -> pa.Table:
    """Windows over every context.

    Returns:
        One row a window: ``input_ids``, ``token_type_ids`` if any, ``length``, ``index``; ``row``,
        the question's position; ``context_start``, ``context_end``, the tokens of the context;
        ``offsets``, the first and last character of each of those, flat; and ``start_positions``,
        ``end_positions`` where there are answers (0, the first special token, when the window does
        not hold the answer).

    Raises:
        UserError: the tokenizer cannot tell characters, or the stride leaves no room.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "QA needs a fast tokenizer (one with a tokenizer.json), to find answers in the text; "
            "this is a "
            f"{type(tokenizer).__name__}."
        )
    room = question_room(config, tokenizer)
    tables = []
    for first in range(0, len(rows["id"]), _CHUNK):
        part = range(first, min(first + _CHUNK, len(rows["id"])))
        tables.append(_windows(rows, part, room, config, tokenizer))
    table = pa.concat_tables(tables).combine_chunks()
    return table.append_column("index", pa.array(np.arange(table.num_rows)))


def _cut(tokenizer: Any, questions: list[str], room: int) -> list[str]:
    """Questions of at most ``room`` tokens. Leading spaces would each cost a token in some
    tokenizers."""
    questions = [q.strip() for q in questions]
    made = tokenizer(
        questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [
        q if len(offsets) <= room else q[: offsets[room - 1][1]]
        for q, offsets in zip(questions, made["offset_mapping"], strict=True)
    ]


def _windows(rows: Rows, part: range, room: int, config: DataConfig, tokenizer: Any) -> pa.Table:
    types = token_info(tokenizer).token_types
    made = tokenizer(
        _cut(tokenizer, [rows["question"][i] for i in part], room),
        [rows["context"][i] for i in part],
        truncation="only_second",
        max_length=config.max_length,
        stride=config.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=types,
    )
    owners = [part[i] for i in made["overflow_to_sample_mapping"]]
    spans, offsets = [], []
    for window in range(len(owners)):
        in_context = np.asarray([s == 1 for s in made.sequence_ids(window)])
        places = np.flatnonzero(in_context)
        start, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        spans.append((start, end))
        offsets.append(np.asarray(made["offset_mapping"][window][start:end], np.int32).ravel())
    table = token_columns(made["input_ids"], made["token_type_ids"] if types else None)
    columns = {
        "row": pa.array(owners, pa.int64()),
        "context_start": pa.array([s for s, _ in spans], pa.int32()),
        "context_end": pa.array([e for _, e in spans], pa.int32()),
        "offsets": int_lists(offsets, pa.int32()),
    }
    if "answers" in rows:
        marks = [
            _mark(rows["answers"][owner], span[0], flat.reshape(-1, 2))
            for owner, span, flat in zip(owners, spans, offsets, strict=True)
        ]
        columns["start_positions"] = pa.array([s for s, _ in marks], pa.int64())
        columns["end_positions"] = pa.array([e for _, e in marks], pa.int64())
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _mark(answers: dict[str, list], context_start: int, offsets: np.ndarray) -> tuple[int, int]:
    """First and last token of the first answer in a window, or (0, 0). ``offsets`` is [tokens,
    2]."""
    if not answers["text"] or not len(offsets):
        return 0, 0
    first = answers["answer_start"][0]
    last = first + len(answers["text"][0])
    if first < offsets[0, 0] or last > offsets[-1, 1]:
        return 0, 0
    start = int(np.searchsorted(offsets[:, 0], first, side="right")) - 1
    end = int(np.searchsorted(offsets[:, 1], last, side="left"))
    return context_start + start, context_start + max(start, end)


def best_answers(
    outputs: dict[str, np.ndarray],
    windows: dict[str, Any],
    contexts: list[str],
    max_answer: int,
) -> tuple[list[str], np.ndarray]:
    """The best real span of every question, over all its windows.

    Args:
        outputs: ``row_outputs`` of every window in order, [F, n] (and ``null`` [F]).
        windows: ``row`` [F], ``context_start`` [F], and ``offsets``, an array [tokens, 2] for each
            window.
        contexts: one a question, [R].

    Returns:
        The answers as they stand in their contexts ("" if no window has a span), and [R] by how
        much the score of no answer (the smallest over the windows) exceeds the span's.
    """
    starts, ends = outputs["starts"].astype(np.int64), outputs["ends"].astype(np.int64)  # [F, n]
    scores = outputs["start_logits"][:, :, None] + outputs["end_logits"][:, None, :]  # [F, n, n]
    width = ends[:, None, :] - starts[:, :, None] + 1
    real = (
        (starts >= 0)[:, :, None] & (ends >= 0)[:, None, :] & (width >= 1) & (width <= max_answer)
    )
    flat = np.where(real, scores, NEVER).reshape(len(starts), -1)
    best = flat.argmax(1)  # [F]
    n = starts.shape[1]
    best_score = flat[np.arange(len(flat)), best]
    answers = [""] * len(contexts)
    top = np.full(len(contexts), NEVER, dtype=np.float64)
    null = np.full(len(contexts), np.inf)
    for window, row in enumerate(windows["row"]):
        null[row] = min(null[row], outputs["null"][window])
        if best_score[window] <= max(top[row], NEVER):
            continue
        top[row] = best_score[window]
        shift = windows["context_start"][window]
        offsets = windows["offsets"][window]
        begin = offsets[starts[window, best[window] // n] - shift, 0]
        close = offsets[ends[window, best[window] % n] - shift, 1]
        answers[row] = contexts[row][begin:close].strip()
    return answers, null - top
