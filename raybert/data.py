"""Rows to tokenised Arrow, once: read, check, tokenise, keep; every later run and every worker maps
the files."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from raybert.batches import (
    MODEL_INPUTS,
    Batcher,
    Prefetch,
    eval_batches,
    prefetch,
    steps_per_epoch,
    train_steps,
)
from raybert.config import DataConfig
from raybert.errors import TransientError, UserError
from raybert.features import (
    CHUNK,
    TokenInfo,
    batched,
    check_lengths,
    mlm_features,
    text_features,
    token_info,
    tokenizer_key,
)
from raybert.qa import qa_features, question_room
from raybert.readers import Raw
from raybert.rows import (
    Rows,
    Texts,
    check_classes,
    found_labels,
    refuse_empty,
    standard_rows,
    take,
)
from raybert.sources import read_splits
from raybert.storage import held, pull, push
from raybert.tasks import Task, get_task

__all__ = [
    "MODEL_INPUTS",
    "Batcher",
    "Prefetch",
    "TaskData",
    "eval_batches",
    "load_prepared",
    "prefetch",
    "prepare",
    "steps_per_epoch",
    "train_steps",
]

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when what is kept on disk changes, so that older folders are made anew."""

HOLD_OUT = {"mlm": 0.05}
"""Share of the training rows held out when no dev rows are given; 10 % where no other is named."""

META = "raybert.json"
"""What a folder of prepared data says of itself; without it the folder is not whole."""


@dataclass(frozen=True)
class TaskData:
    """A task's tokenised rows, mapped from disk.

    Attributes:
        task: with its labels.
        splits: tokens by split (``train``, ``dev``, ``test``, those there are); for QA a row is a
            window.
        rows: the rows they were made from, with the standard columns of ``raybert.rows``.
        folder: where both are kept; ``load_prepared`` opens it.
        key: the digest of everything that they depend on.
        tokens: what batches need to know of the tokenizer.
    """

    task: Task
    splits: dict[str, datasets.Dataset]
    rows: dict[str, datasets.Dataset]
    folder: Path
    key: str
    tokens: TokenInfo

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of each feature of a split, [N]."""
        return np.asarray(self.splits[split].with_format("arrow")[:]["length"])

    def batcher(self, split: str, seed: int = 0) -> Batcher:
        """What builds a split's batches. ``seed`` draws the training masks of mlm; dev's are always
        the same."""
        return Batcher(
            self.splits[split], self.task, self.tokens, seed=seed if split == "train" else 0
        )


def prepare(
    name: str,
    config: DataConfig,
    tokenizer: Any,
    splits: Iterable[str] = ("train", "dev", "test"),
) -> TaskData:
    """Read, check and tokenise a task's rows, or find the folder where that has been done.

    Args:
        name: a key of ``raybert.tasks.TASKS``.
        tokenizer: a Hugging Face tokenizer, fast for QA.
        splits: those wanted; one that the source does not have is left out. Without dev rows, a
            tenth of the training rows (a twentieth for mlm) is held out, the same each time.

    Raises:
        UserError: something is wrong with the task's name, its options or its rows.
    """
    task = get_task(name, config)
    check_lengths(task, config, tokenizer)
    if task.kind == "qa":
        question_room(config, tokenizer)
    task, rows = _read(task, config, tuple(splits))
    key = _key(task, config, tokenizer, rows)
    folder = config.cache_folder / f"{name}-{key[:20]}"
    with held(folder):
        pull(folder, META)
        kept = _load_kept(folder)
        if kept is not None:
            return kept
        log.info("tokenising %s rows", {split: _count(r) for split, r in rows.items()})
        features = {split: _features(task, r, config, tokenizer) for split, r in rows.items()}
        _store(folder, task, key, token_info(tokenizer), features, rows)
        push(folder, last=META)
        return load_prepared(folder)


def find_prepared(config: DataConfig, name: str) -> TaskData | None:
    """What ``prepare`` has kept in ``data.cache`` as a folder of that name, if it is there and
    whole; no raw row is read."""
    folder = config.cache_folder / name
    with held(folder):
        pull(folder, META)
        return _load_kept(folder)


def load_prepared(folder: Path) -> TaskData:
    """Open what ``prepare`` has kept, reading no raw row.

    Raises:
        UserError: the folder is missing or not whole.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        for file, size in meta["files"].items():
            if (folder / file).stat().st_size != size:
                raise ValueError(f"{file} is not {size} bytes long")
        parts: dict[str, dict[str, datasets.Dataset]] = {"splits": {}, "rows": {}}
        for part, opened in parts.items():
            for split in meta["splits"]:
                # Mapped, not read: workers of one machine share the pages.
                opened[split] = datasets.Dataset.from_file(str(folder / part / f"{split}.arrow"))
        return TaskData(
            task=Task.model_validate(meta["task"]),
            folder=folder,
            key=meta["key"],
            tokens=TokenInfo.model_validate(meta["tokens"]),
            **parts,
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, ValidationError) as error:
        raise UserError(
            f"{folder} does not hold tokenised data that can be used ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); prepare it again."
        ) from None


def _load_kept(folder: Path) -> TaskData | None:
    if not folder.exists():
        return None
    try:
        return load_prepared(folder)
    except UserError as error:
        log.warning("making the tokenised data again: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _read(task: Task, config: DataConfig, splits: tuple[str, ...]) -> tuple[Task, dict[str, Rows]]:
    """Standard rows of the wanted splits, and the task with its labels."""
    # Training rows are read even when only dev is wanted: they settle the labels, and what is held
    # out.
    raws = read_splits(task, config, dict.fromkeys(("train", *splits)))
    if not raws:
        raise UserError(
            f"there are no rows for {', '.join(splits)} of task {task.name}; name files with "
            "data.train, "
            "data.dev or data.test."
        )
    for split, raw in raws.items():
        refuse_empty(raw, split)
    if task.labels is None and task.kind in ("classification", "multilabel"):
        task = task.model_copy(update={"labels": _labels_of(task, raws, config)})
    rows = {split: standard_rows(task, raw, split, config) for split, raw in raws.items()}
    if "train" in rows:
        check_classes(task, rows["train"], raws["train"].origin)
        if "dev" in splits and "dev" not in rows:
            rows |= _hold_out(task, rows["train"], raws["train"].origin)
        rows["train"] = _limited(rows["train"], config.limit)
    return task, {split: rows[split] for split in splits if split in rows}


def _labels_of(task: Task, raws: dict[str, Raw], config: DataConfig) -> tuple[str, ...]:
    for split in ("train", "dev"):
        if split in raws:
            return found_labels(task, raws[split], config)
    raise UserError(
        f"the labels of task {task.name} are not known without training rows; name them with "
        "data.labels."
    )


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _hold_out(task: Task, rows: Rows, origin: str) -> dict[str, Rows]:
    count = _count(rows)
    held = max(1, round(count * HOLD_OUT.get(task.kind, 0.1)))
    if count < 2:
        raise UserError(
            f"{origin} holds a single row, so none can be held out; name dev rows with data.dev."
        )
    order = np.random.default_rng(0).permutation(count)
    log.warning(
        "no dev rows were given: %d of the %d training rows of %s are held out", held, count, origin
    )
    return {
        "train": take(rows, np.sort(order[held:])),
        "dev": take(rows, np.sort(order[:held])),
    }


def _limited(rows: Rows, limit: int | None) -> Rows:
    count = _count(rows)
    if limit is None or limit >= count:
        return rows
    return take(rows, np.sort(np.random.default_rng(0).permutation(count)[:limit]))


def _features(task: Task, rows: Rows, config: DataConfig, tokenizer: Any) -> Iterable[pa.Table]:
    """Tokens, as one table or, of a corpus, as many that are made when they are asked for."""
    if task.kind == "qa":
        return [qa_features(rows, config, tokenizer)]
    if task.kind == "mlm":
        return mlm_features(rows["text"], config, tokenizer)
    return [text_features(task, rows, config, tokenizer)]


def _tables(rows: Rows) -> Iterable[pa.Table]:
    """Rows as one table or, of a corpus, as many that are made when they are asked for."""
    texts = rows.get("text")
    if isinstance(texts, Texts):
        return (pa.table({"text": some}) for some in batched(texts, CHUNK))
    return [pa.table(rows)]


def _key(task: Task, config: DataConfig, tokenizer: Any, rows: dict[str, Rows]) -> str:
    options = [FORMAT, task.model_dump(mode="json"), config.max_length, config.stride, list(rows)]
    digest = hashlib.sha256(json.dumps([options, tokenizer_key(tokenizer)]).encode())
    for split in rows:
        for name, values in rows[split].items():
            parts = batched(values, CHUNK) if isinstance(values, Texts) else [values]
            for part in parts:
                digest.update(json.dumps([split, name, part]).encode())
    return digest.hexdigest()


def _store(
    folder: Path,
    task: Task,
    key: str,
    tokens: TokenInfo,
    features: dict[str, Iterable[pa.Table]],
    rows: dict[str, Rows],
) -> None:
    """Write everything beside ``folder`` and rename it there, so that a reader sees all of it or
    nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _cannot_keep(folder, error) from None
    try:
        for split in features:
            _write_arrow(partial / "splits" / f"{split}.arrow", features[split])
            _write_arrow(partial / "rows" / f"{split}.arrow", _tables(rows[split]))
        files = {
            str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*.arrow"))
        }
        meta = {
            "key": key,
            "task": task.model_dump(mode="json"),
            "tokens": tokens.model_dump(mode="json"),
            "splits": list(features),
            "files": files,
        }
        (partial / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        _rename(partial, folder)
    except OSError as error:
        raise _cannot_keep(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, folder: Path) -> None:
    try:
        os.rename(partial, folder)
    except OSError:
        # Another process has put the same content there first.
        if not folder.exists():
            raise


def _cannot_keep(folder: Path, error: OSError) -> UserError:
    return TransientError(
        f"tokenised data cannot be kept in {folder.parent} ({error.strerror or error}); make room, "
        "or choose another folder with data.cache."
    )


def _write_arrow(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema one after the other; there is one at least."""
    path.parent.mkdir(exist_ok=True)
    tables = iter(tables)
    first = next(tables)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table, max_chunksize=CHUNK)
