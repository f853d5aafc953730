"""Where rows come from: the Hub, a GLUE, aclImdb or SQuAD folder, a user's own files, or the demo
generator."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import datasets

from raybert.config import DataConfig
from raybert.demo_task import LABELS, demo_rows
from raybert.errors import UserError
from raybert.explain import nearest
from raybert.readers import GLUE_COLUMNS, Raw, read_acl_imdb, read_file, read_glue
from raybert.storage import fetch
from raybert.tasks import Task

SPLITS = ("train", "dev", "test")
_FORMATS = ("csv", "tsv", "jsonl", "parquet", "json", "txt")
_STEMS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


def read_splits(task: Task, config: DataConfig, splits: Iterable[str]) -> dict[str, Raw]:
    """The rows of each wanted split that the source has. The split may be absent; a broken one is
    refused.

    Raises:
        UserError: nothing there, or not readable.
    """
    splits = tuple(splits)
    named = {s: value for s in SPLITS if (value := config.model_dump()[s]) is not None}
    if config.source is None and named:
        return {
            s: read_file(fetch(v), qa=task.kind == "qa") for s, v in named.items() if s in splits
        }
    if config.source is None and task.name == "demo":
        return {s: _demo(s) for s in splits}
    if config.source is None:
        if task.hub is None:
            raise UserError(
                f"task {task.name} has no data set of its own; name yours with data=FOLDER, or "
                "data.train=FILE and data.dev=FILE."
            )
        return _read_hub(task, task.hub, named, splits)
    path = fetch(config.source)
    if path.is_dir():
        return _read_folder(task, path, named, splits)
    if path.is_file():
        if named:
            raise UserError(
                f"data.source is the file {path}, so data.{next(iter(named))} has no folder to be "
                "found in; "
                "drop data.source and name each file with data.train, data.dev and data.test."
            )
        return {"train": read_file(path, qa=task.kind == "qa")} if "train" in splits else {}
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", config.source):
        raise UserError(f"no such file or folder: {path} (data.source).")
    return _read_hub(task, config.source, named, splits)


def _demo(split: str) -> Raw:
    return Raw({**demo_rows(split)}, f"the demo task's {split} rows", label_names=LABELS)


def _read_folder(
    task: Task, folder: Path, named: dict[str, str], splits: tuple[str, ...]
) -> dict[str, Raw]:
    if not named and task.glue is not None:
        for candidate in (folder, folder / task.glue):
            if any((candidate / f"{task.glue_splits[s]}.tsv").is_file() for s in SPLITS):
                return _read_glue_folder(task, candidate, splits)
    if not named and task.kind == "classification" and (folder / "train" / "pos").is_dir():
        # The data set has two halves; what the first trains, the second judges.
        halves = {"train": "train", "dev": "test"}
        return {s: read_acl_imdb(folder / halves[s]) for s in splits if s in halves}
    files = {s: _find(task, folder, s, named) for s in splits}
    found = {s: read_file(path, qa=task.kind == "qa") for s, path in files.items() if path}
    if not found:
        raise UserError(
            f"{folder} holds no data that task {task.name} can read: wanted "
            f"{task.glue + ' tsv files, ' if task.glue else ''}train.* and dev.* "
            f"({', '.join(_FORMATS)})"
            f"{', or train-*.json and dev-*.json' if task.kind == 'qa' else ''}; found "
            f"{', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}."
        )
    return found


def _read_glue_folder(task: Task, folder: Path, splits: tuple[str, ...]) -> dict[str, Raw]:
    """GLUE's files with their columns renamed to the ones that the task knows from the Hub."""
    found = {}
    for split in splits:
        path = folder / f"{task.glue_splits[split]}.tsv"
        if not path.is_file():
            if split == "test":
                continue
            raise UserError(f"no such file: {path}; GLUE's {task.glue} folder holds it.")
        raw = read_glue(folder, str(task.glue), task.glue_splits[split])
        text, pair, label = GLUE_COLUMNS[str(task.glue)]
        columns = {task.text: raw.column(text, "data.text")}
        if task.text_pair is not None and pair is not None:
            columns[task.text_pair] = raw.column(pair, "data.text_pair")
        if split != "test":
            columns[task.label] = raw.column(label, "data.label")
        found[split] = Raw(columns, raw.origin, raw.places)
    return found


def _find(task: Task, folder: Path, split: str, named: dict[str, str]) -> Path | None:
    """The file of a split in a folder: the named one, ``train.csv`` and the like, or SQuAD's
    ``train-*.json``."""
    if named:
        if split not in named:
            return None
        inside = folder / fetch(named[split])
        return inside if inside.is_file() else fetch(named[split])
    found = [
        p for stem in _STEMS[split] for ext in _FORMATS if (p := folder / f"{stem}.{ext}").is_file()
    ]
    if task.kind == "qa" and not found:
        found = sorted(p for stem in _STEMS[split] for p in folder.glob(f"{stem}-*.json"))
    if len(found) > 1:
        raise UserError(
            f"{folder} holds several files for {split}: {', '.join(p.name for p in found)}. "
            f"Choose one with data.{split}=FILE."
        )
    return found[0] if found else None


def _read_hub(
    task: Task, name: str, named: dict[str, str], splits: tuple[str, ...]
) -> dict[str, Raw]:
    try:
        loaded = datasets.load_dataset(name, task.subset)
    # Whatever goes wrong there (network, name, configuration, the data set's own files) is the
    # user's to mend, and the library raises a dozen unrelated types for it.
    except Exception as error:
        raise UserError(
            f"data set {name!r} could not be loaded: it is no file or folder here, and the "
            "Hugging Face Hub "
            f"answered {type(error).__name__}: {' '.join(str(error).split())[:200]}. Check the "
            "name, data.subset "
            "and the network, or name local rows with data=FOLDER."
        ) from None
    found = {}
    for split in splits:
        wanted = named.get(split, task.hub_splits.get(split, ""))
        if wanted in loaded:
            found[split] = _from_hub(task, loaded[wanted], f"{name}, split {wanted}")
        elif split in named:
            raise UserError(
                f"data set {name!r} has no split {wanted!r}{nearest(wanted, loaded)}; it has "
                f"{', '.join(map(str, loaded))}. Name one with data.{split}=SPLIT."
            )
    return found


def _from_hub(task: Task, rows: datasets.Dataset, origin: str) -> Raw:
    feature = rows.features.get(task.label)
    if isinstance(feature, datasets.List):
        feature = feature.feature
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    wanted = {"id", task.text, task.text_pair, task.label} & set(rows.column_names)
    columns = {name: rows[name] for name in rows.column_names if name in wanted}
    if task.kind != "mlm":  # a corpus stays on disk
        columns = {name: list(values) for name, values in columns.items()}
    # Columns that are not wanted are named only, so that an error can list them.
    return Raw(columns, origin, label_names=names)
