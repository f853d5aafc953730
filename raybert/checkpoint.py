"""Training state on storage: save it whole or not at all, find the last good one, restore it.

A checkpoint is a folder that gets its name only once every file is written and listed, with size
and checksum, in ``manifest.json``. One that was cut short or damaged later is passed over, with a
warning, for the one before. The last two are kept.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from raybert.engine import load_whole_state, scaler_of, whole_state
from raybert.errors import TransientError, UserError
from raybert.storage import entries, pull, push, remove

logger = logging.getLogger("raybert")

KEPT = 2
MANIFEST = "manifest.json"
BEST = "best.safetensors"
OWN_RATES = ("peak_lr", "weight_decay")
"""What an optimiser's group has from the recipe, whatever a checkpoint says."""


@dataclass(frozen=True)
class World:
    """This process among the workers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for every worker."""
        if self.size > 1:
            dist.barrier()

    def all_true(self, flag: bool) -> bool:
        """Whether ``flag`` holds on every worker."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return bool(value.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over workers of a tensor, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def agreed(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, unless it fails on some worker: then all raise alike.

        A worker that raised alone would leave the others waiting for it.
        """
        value, problem = None, None
        try:
            value = make()
        except UserError as error:
            problem = error
        problems = [error for error in self.gather(problem) if error is not None]
        if problems:
            raise problems[0]
        return value

    def on_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on the first worker, on every worker; its error likewise."""
        return self.gather(self.agreed(make if self.rank == 0 else lambda: None))[0]

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, on every worker."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every worker the first one's values of tensors that all have, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        phase: index of the phase.
        step: its optimiser steps done.
        best: the best dev score of the phase so far, and the step it was reached at.
        log_lines: lines of metrics.jsonl that belong to the run up to here.
        seconds: training time so far, all phases.
        tokens: tokens processed so far, padding included, all phases and workers.
        steps: optimiser steps so far, all phases.
        finished: name, steps and seconds of each phase that has ended.
        notes: what the report should tell of the run.
        settled: methods as they were settled against weights, by place in the chain.
        facts: what phases told of their start: phase -> title -> name -> number.
        most: workers that the run's epochs were planned for; 0 where an earlier version wrote it.
    """

    phase: int = 0
    step: int = 0
    best: float | None = None
    best_step: int = 0
    log_lines: int = 0
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    finished: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settled: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    most: int = 0


def save(
    folder: Path,
    engine: Any,
    position: Position,
    world: World,
    stage: int,
    best: Path | None = None,
) -> Path:
    """Write a checkpoint; every worker calls this.

    Args:
        folder: where a run's checkpoints are.
        engine: the DeepSpeed engine.
        position: how far the run has come.
        world: this worker.
        stage: the ZeRO stage.
        best: file of the phase's best weights so far, kept with the checkpoint when there is one.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: storage refused; what was saved before is still there.
    """
    target = folder / f"phase{position.phase}-step{position.step:07d}"
    partial = folder / f".partial-{target.name}"
    problem: Exception | None = None
    if world.rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            problem = error
    if not world.all_true(problem is None):
        raise _storage_error(target, folder, problem)
    try:
        _write(partial, engine, position, world, stage)
        if world.rank == 0 and best is not None and best.is_file() and position.best is not None:
            _link(best, partial / BEST)
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = error
    if world.all_true(problem is None) and world.rank == 0:
        try:
            _seal(partial, target)
        except OSError as error:
            problem = error
    if not world.all_true(problem is None):
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise _storage_error(target, folder, problem)
    if world.rank == 0:
        for old in _superseded(_newest_first(folder), target):
            shutil.rmtree(old, ignore_errors=True)
    return target


def send(checkpoint: Path) -> None:
    """Send a checkpoint to the run's object storage, then remove all but the last ones there.

    Raises:
        UserError: storage refused; what was sent before is still there.
    """
    try:
        push(checkpoint, last=MANIFEST)
    except UserError as error:
        before = [p for p in _newest_first(checkpoint.parent) if _place(p) < _place(checkpoint)]
        left = f"the one before, {before[0].name}, is the last" if before else "none is"
        raise UserError(
            f"checkpoint {checkpoint.name} did not get into object storage; {left} there: {error} "
            "It continues from there."
        ) from None
    with suppress(UserError):  # what is too much goes with the next one
        there = [checkpoint.parent / name for name in entries(checkpoint.parent)]
        for old in _superseded(_sorted(there), checkpoint):
            remove(old)


def bring(folder: Path) -> None:
    """Make a mirror hold the checkpoints that its object storage has whole.

    Raises:
        UserError: storage does not answer.
    """
    here = [path.name for path in folder.glob("phase*-step*")]
    for path in _sorted(folder / name for name in {*here, *entries(folder)}):
        pull(path, MANIFEST)


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is only ever replaced whole; a copy where links are not had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def bring_back_best(checkpoint: Path, best: Path) -> None:
    """Put the best weights back to those of the checkpoint: later ones belong to lost steps."""
    if (checkpoint / BEST).is_file():
        partial = best.with_name(f".partial-{best.name}")
        partial.unlink(missing_ok=True)
        _link(checkpoint / BEST, partial)
        os.replace(partial, best)


def _write(partial: Path, engine: Any, position: Position, world: World, stage: int) -> None:
    rng = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(world.device)
    # Below stage 3 the first worker writes everything: the others may share no disk with it.
    every = world.gather(rng)
    if stage == 3:
        engine.save_checkpoint(str(partial), tag="zero", save_latest=False)
    else:
        # Whole, by the first worker: other workers, at another stage, can go on from it.
        state, scaler = whole_state(engine), scaler_of(engine)
        if world.rank == 0:
            save_file(_copies(engine.module), partial / "model.safetensors")
            torch.save(state, partial / "optimizer.pt")
            if scaler is not None:
                torch.save(scaler.state_dict(), partial / "scaler.pt")
    if world.rank == 0:
        for rank, rng in enumerate(every):
            torch.save(rng, partial / f"rng-{rank}.pt")
        state = {**asdict(position), "workers": world.size, "zero": stage}
        (partial / "state.json").write_text(json.dumps(state))


def _seal(partial: Path, target: Path) -> None:
    files = [p for p in sorted(partial.rglob("*")) if p.is_file()]
    manifest = {str(p.relative_to(partial)): [p.stat().st_size, _crc32(p)] for p in files}
    (partial / MANIFEST).write_text(json.dumps(manifest))
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _storage_error(target: Path, folder: Path, problem: Exception | None) -> TransientError:
    why = " ".join(str(problem).split()) if problem else "another worker could not write"
    kept = _newest_first(folder)
    left = (
        f"The last good checkpoint, {kept[0].name}, is untouched" if kept else "None was saved yet"
    )
    return TransientError(
        f"checkpoint {target.name} could not be written to {folder}: {why}. {left}; make room, "
        "or mend the storage, and start the same command again: it continues there."
    )


def _newest_first(folder: Path) -> list[Path]:
    return _sorted(folder.glob("phase*-step*"))


def _sorted(paths: Iterable[Path]) -> list[Path]:
    # What a user has copied beside them, as `phase0-step0000006 (copy)`, is none.
    return sorted((path for path in paths if _place(path)), key=_place, reverse=True)


def _superseded(newest_first: list[Path], latest: Path) -> list[Path]:
    """All checkpoints but the latest to be written and those just before it. One of a later step is
    damaged, or the run would have gone on from there: it must not take a good one's place."""
    kept = [path for path in newest_first if _place(path) <= _place(latest)][:KEPT]
    return [path for path in newest_first if path not in kept]


def _place(path: Path) -> tuple[int, ...]:
    """Phase and step; nothing where the folder's name is not a checkpoint's."""
    found = re.fullmatch(r"phase(\d+)-step(\d+)", path.name)
    return (int(found[1]), int(found[2])) if found else ()


def find_last_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
    passed_over = []
    for path in _newest_first(folder):
        fault = _fault(path)
        if fault is None:
            return path, passed_over
        passed_over.append(
            f"checkpoint {path.name} is damaged ({fault}); falling back to the one before"
        )
    return None, passed_over


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = [(name, size, checksum) for name, (size, checksum) in manifest.items()]
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{MANIFEST} is missing or cut short"
    for name, size, checksum in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _crc32(file) != checksum:
            return f"{name} has another checksum"
    return None


def read_position(path: Path) -> tuple[Position, int, int]:
    """A checkpoint's position, the number of workers that wrote it, and their ZeRO stage."""
    state = json.loads((path / "state.json").read_text())
    workers, stage = state.pop("workers"), state.pop("zero")
    return Position(**state), workers, stage


def restore(path: Path, engine: Any, world: World, stage: int) -> Position:
    """Put the engine and the random state back to where a checkpoint left them.

    Raises:
        UserError: the checkpoint is of ZeRO 3 and this run is not, the other way round, or either
            with another number of workers.
    """
    position, workers, saved_stage = read_position(path)
    apart = 3 in (stage, saved_stage)
    if apart and (saved_stage != stage or workers != world.size):
        raise UserError(
            f"{path} was written by {workers} workers at ZeRO stage {saved_stage}; this run has "
            f"{world.size} at stage {stage}. Continue with workers={workers} "
            f"train.zero={saved_stage}, or start another run folder."
        )
    # Rates are the recipe's: a trial that takes over another's checkpoint goes on at its own.
    own = [{key: group[key] for key in OWN_RATES} for group in engine.optimizer.param_groups]
    if apart:
        loaded, _ = engine.load_checkpoint(str(path), tag="zero")
        if loaded is None:
            raise UserError(f"DeepSpeed could not load {path}; remove that folder and start again.")
    else:
        load_weights(engine.module, path / "model.safetensors")
        load_whole_state(
            engine, torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        )
        scaler = scaler_of(engine)
        if scaler is not None and (path / "scaler.pt").is_file():
            scaler.load_state_dict(torch.load(path / "scaler.pt", weights_only=True))
    for group, rates in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(rates)
    engine.global_steps = position.step
    rng_file = path / f"rng-{world.rank}.pt"
    if rng_file.is_file():  # absent where there are more workers than before
        rng = torch.load(rng_file, weights_only=True)
        torch.set_rng_state(rng["cpu"])
        if world.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], world.device)
    return position


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights and buffers as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        save_file(_copies(model), partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"weights could not be written to {path}: {' '.join(str(error).split())}. Make room, "
            f"or mend "
            "the storage, and start the same command again: it continues from its last checkpoint."
        ) from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what `save_weights` wrote, into the tensors that the model has."""
    stored = load_file(path)
    tensors = _tensors(model)
    if stored.keys() != tensors.keys():
        raise ValueError(
            f"{path} holds other tensors: {sorted(stored.keys() ^ tensors.keys())[:5]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


def load_shared(model: nn.Module, path: Path, world: World) -> None:
    """`load_weights` on every worker, of a file that the first may be alone to have."""
    world.on_first(lambda: load_weights(model, path))
    world.share(_tensors(model).values())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and persistent buffers by name, shared ones once."""
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _copies(model: nn.Module) -> dict[str, torch.Tensor]:
    # Copies, because ZeRO makes all weights views of one storage, which safetensors will not write.
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _tensors(model).items()
    }
