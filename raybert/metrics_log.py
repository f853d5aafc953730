"""metrics.jsonl and TensorBoard: one line an event, and nothing twice when a run is continued."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from raybert.folders import write_whole
from raybert.storage import push

logger = logging.getLogger("raybert")

FILE = "metrics.jsonl"


class MetricsLog:
    """The log of one run; only the first worker's writes.

    Args:
        folder: the run folder.
        writes: whether this worker writes.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.path, self.writes, self.lines = folder / FILE, writes, 0
        self._file: Any = None
        self._board: Any = None

    def send(self) -> None:
        """Send both to the run's object storage, if it has one; a bucket's files do not grow, so
        whole.

        Raises:
            UserError: storage refused.
        """
        if self._board is not None:
            self._board.flush()
        push(self.path)
        push(self.path.parent / "tensorboard")

    def rewind(self, lines: int) -> None:
        """Drop what a run wrote after the checkpoint that it now continues from."""
        self.lines = lines
        if not self.writes:
            return
        kept: list[str] = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8") as file:
                kept = _whole(file.readlines()[:lines])
        write_whole(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        from torch.utils.tensorboard import SummaryWriter

        step = json.loads(kept[-1])["run_step"] if kept else 0
        self._board = SummaryWriter(self.path.parent / "tensorboard", purge_step=step + 1)

    def write(self, values: dict[str, Any], run_step: int) -> None:
        """Append a line.

        Args:
            values: ``kind``, ``phase``, ``step`` and numbers.
            run_step: optimiser steps over all phases, the horizontal axis in TensorBoard.
        """
        self.lines += 1
        if not self.writes:
            return
        line = {"time": round(time.time(), 3), "run_step": run_step, **values}
        try:
            self._file.write(json.dumps(line) + "\n")
            for key, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{values['kind']}/{key}", value, run_step)
        except OSError as error:
            # The next checkpoint meets the same storage, and stops the run with a way to mend it.
            logger.warning("%s could not be written: %s", self.path, error)

    def close(self) -> None:
        """Flush and close both."""
        for log in (self._file, self._board):
            if log is not None:
                with contextlib.suppress(OSError):
                    log.close()


def _whole(lines: list[str]) -> list[str]:
    """The lines up to the first that was cut short."""
    kept = []
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            break
        kept.append(line)
    return kept
