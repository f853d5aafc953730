"""What a run was begun with: its rows and models. The recipe names them, and what lies there may
have changed since."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from raybert.data import TaskData
from raybert.errors import TransientError, UserError
from raybert.folders import write_whole
from raybert.storage import push
from raybert.teacher import teacher_digest

INPUTS = "inputs.json"
"""In a run folder: a digest of each."""

WHAT = {"rows": "the rows of `data`", "start": "the model", "teacher": "the teacher"}


def inputs_of(data: TaskData, start: str, teacher: str | None) -> dict[str, str]:
    """Digests of what a run reads.

    Args:
        data: its rows.
        start: the model that it starts from.
        teacher: one that was not made by the run itself.
    """
    found = {"rows": rows_digest(data), "start": _model_digest(start)}
    if teacher is not None:
        found["teacher"] = found["start"] if teacher == start else _model_digest(teacher)
    return found


def rows_digest(data: TaskData) -> str:
    """Of what is trained and scored on: another library's other name for it changes nothing."""
    digest = hashlib.sha256()
    for split in ("train", "dev"):
        table: Any = data.splits[split].with_format("arrow")[:]
        for name in sorted(table.column_names):
            digest.update(f"{split} {name} {len(table)}\n".encode())
            for chunk in table[name].chunks:
                lists = pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)
                numbers = chunk.flatten() if lists else chunk
                digest.update(numbers.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _model_digest(name: str) -> str:
    """Of a folder, its weights and config; of a Hub model the name, since its files hardly change
    and its commits do."""
    return teacher_digest(name) if Path(name).is_dir() else name


def changed(folder: Path, inputs: dict[str, str]) -> list[str]:
    """What a run folder was begun with that is another now, in words; nothing where it does not
    say."""
    try:
        held = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(held, dict):
        return []
    return [WHAT[key] for key, digest in inputs.items() if held.get(key, digest) != digest]


def keep_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Write them into a run folder, or hold them against what is there.

    Raises:
        UserError: they are not what the run was begun with, or storage refused.
    """
    different = changed(folder, inputs)
    if different:
        raise UserError(
            f"{folder} was begun with other inputs: {' and '.join(different)} changed since. Put "
            f"back what was there to go on, or remove {INPUTS} there if that makes no difference; "
            "choose another out=, or add --overwrite to remove that run first."
        )
    try:
        write_whole(folder / INPUTS, json.dumps(inputs, indent=1))
    except OSError as error:
        raise TransientError(f"cannot write to {folder}: {error}. Choose another out=.") from None
    push(folder / INPUTS)
