"""A search's ledger: one small file a trial, which says what was drawn and what became of it.

Trials have numbers, in the order in which they were drawn. The ledger and the trials' run folders
are all that a killed search needs to go on: Ray's own state is not read again.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raybert.errors import UserError
from raybert.folders import write_whole

SEARCH = "search.yaml"
"""What a search folder says of itself, beside the ledger; written before the first trial."""

State = Literal["running", "finished", "stopped", "failed", "skipped"]

DONE = ("finished", "stopped", "failed", "skipped")
"""States that a search which goes on leaves as they are."""


def run_name(number: int, seed: int | None) -> str:
    """What a trial's files and folders are called."""
    return f"{number:03d}" + ("" if seed is None else f"-seed{seed}")


@dataclass
class Trial:
    """One trial.

    Attributes:
        number: in the order of drawing.
        values: the sample: dotted recipe keys, those of unused methods left out.
        state: ``running`` also when the search was killed; ``stopped``: by the scheduler.
        reason: why it failed or was skipped.
        results: objectives and other numbers of its last report.
        curve: ``[percent of its steps, score]`` of each evaluation.
        points: objectives and other numbers of each evaluation of the curve.
        seconds: wall-clock seconds, those of killed attempts as far as they were reported.
        cores: CPU cores that it holds.
        core_seconds: seconds times the cores that it held then: a search that goes on may share a
            machine out otherwise.
        gpu_seconds: the same of GPUs.
        seed: of a finalist's run; None for the search's own trials.
    """

    number: int
    values: dict[str, Any]
    state: State = "running"
    reason: str = ""
    results: dict[str, float] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    cores: float = 0.0
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    seed: int | None = None

    @property
    def name(self) -> str:
        """What its files and folders are called."""
        return run_name(self.number, self.seed)


def run_folder(folder: Path, number: int, seed: int | None = None) -> Path:
    """Where in a search folder a trial is run, or a finalist with a further seed."""
    return folder / ("trials" if seed is None else "finalists") / run_name(number, seed)


SPENT = "spent.json"
"""In the ledger's folder: seconds by the clock, by what the search did in them."""


class Ledger:
    """The trials of a search, in memory and on disk, and the time that it has taken.

    Args:
        folder: the search folder; its trials' files are in ``ledger/``.

    Attributes:
        spent: seconds by the clock over all starts of the search, by what it did in them; nothing
            where an earlier version, which did not count them, began it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "ledger"
        self._trials = {trial.name: trial for trial in map(_read, sorted(self._files()))}
        there = (self.folder / SPENT).is_file()
        self.spent: dict[str, float] = _parsed(self.folder / SPENT) if there else {}
        self._counts = there or not self._trials
        self._since = time.monotonic()

    def spend(self, what: str) -> None:
        """Count the seconds since the last count, or since the ledger was opened."""
        now = time.monotonic()
        if self._counts:
            self.spent[what] = self.spent.get(what, 0.0) + now - self._since
            write_whole(self.folder / SPENT, json.dumps(self.spent))
        self._since = now

    def _files(self) -> list[Path]:
        return list(self.folder.glob("[0-9]*.json"))

    def get(self, number: int, seed: int | None = None) -> Trial | None:
        """A trial, if it was drawn."""
        return self._trials.get(run_name(number, seed))

    def write(self, trial: Trial) -> None:
        """Note a trial as it is now; its file is replaced whole."""
        self._trials[trial.name] = trial
        text = json.dumps(asdict(trial), indent=1) + "\n"
        write_whole(self.folder / f"{trial.name}.json", text)

    def reopen_failed(self) -> int:
        """Let failed trials run again, from their last checkpoints; how many there are."""
        failed = [trial for trial in self.all if trial.state == "failed"]
        for trial in failed:
            trial.state, trial.reason = "running", ""
            self.write(trial)
        return len(failed)

    def remove_checkpoints(self) -> None:
        """Remove what stopped trials would go on from, which they never do: those of large models
        would fill the disk. Failed ones keep theirs, for `reopen_failed`."""
        for trial in self.all:
            if trial.state == "stopped":
                folder = run_folder(self.folder.parent, trial.number, trial.seed)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    @property
    def trials(self) -> list[Trial]:
        """The search's own trials, in order of drawing."""
        return sorted((t for t in self._trials.values() if t.seed is None), key=lambda t: t.number)

    @property
    def ended(self) -> int:
        """How many of them need not be run again, skipped ones not counted."""
        return sum(t.state in DONE and t.state != "skipped" for t in self.trials)

    def seeds_of(self, number: int) -> list[Trial]:
        """A finalist's runs with further seeds."""
        runs = [t for t in self._trials.values() if t.seed is not None and t.number == number]
        return sorted(runs, key=lambda t: t.seed or 0)

    @property
    def all(self) -> list[Trial]:
        """Every trial, the finalists' runs too."""
        return list(self._trials.values())


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); remove it.") from None


def _read(file: Path) -> Trial:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        # An earlier version kept none, and took the last cores for those of all its seconds.
        return Trial(**{"core_seconds": held["seconds"] * held["cores"], **held})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({error}); remove it, and the trial is drawn again."
        ) from None
