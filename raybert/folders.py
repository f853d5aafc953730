"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from raybert.errors import TransientError, UserError
from raybert.places import HIDDEN

PATIENCE = 15
"""Seconds that a process which was killed may take to be gone."""


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """One process at a time works in a run's folder; two would remove each other's files.

    Raises:
        UserError: another one does.
    """
    lock = FileLock(folder / f"{HIDDEN}lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise TransientError(
            f"another process is working in {folder}; wait for it, or end it, and start the same "
            "command again: it goes on from the last checkpoint. If there is none any more, the "
            f"storage does not know: remove {folder / f'{HIDDEN}lock'}."
        ) from None
    except (OSError, NotImplementedError):
        pass  # storage without locks, or what cannot be written to: that is told by who writes
    try:
        yield
    finally:
        lock.release()


def write_whole(file: Path, data: bytes | str) -> None:
    """Write beside the file and rename: a reader finds the old or the new, never half.

    Args:
        file: its folder is made where there is none.
        data: text becomes UTF-8.

    Raises:
        OSError: storage refused; what was there still is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{uuid.uuid4().hex}")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place, and that of what was there, when all went
    well, and is gone otherwise.

    Raises:
        UserError: it cannot be written.
    """
    partial, old = (target.parent / f".{kind}-{target.name}" for kind in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error}. Choose another --out.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
