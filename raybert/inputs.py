"""What a run was begun with: its rows and models. The recipe names them, and what lies there may
have changed since."""

from __future__ import annotations

import json
from pathlib import Path

from raybert.config import UserError
from raybert.folders import write_whole
from raybert.storage import push
from raybert.teacher import teacher_digest

INPUTS = "inputs.json"
"""In a run folder: a digest of each."""

WHAT = {"rows": "the rows of `data`", "start": "the model", "teacher": "the teacher"}


def inputs_of(rows: str, start: str, teacher: str | None) -> dict[str, str]:
    """Digests of what a run reads.

    Args:
        rows: `raybert.data.TaskData.key`.
        start: the model that it starts from.
        teacher: one that was not made by the run itself.
    """
    found = {"rows": rows, "start": teacher_digest(start)}
    if teacher is not None:
        found["teacher"] = found["start"] if teacher == start else teacher_digest(teacher)
    return found


def changed(folder: Path, inputs: dict[str, str]) -> list[str]:
    """What a run folder was begun with that is another now, in words; nothing where it does not
    say."""
    try:
        held = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
            "back what was there to go on, choose another out=, or add --overwrite to remove that "
            "run first."
        )
    try:
        write_whole(folder / INPUTS, json.dumps(inputs, indent=1))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}. Choose another out=.") from None
    push(folder / INPUTS)
