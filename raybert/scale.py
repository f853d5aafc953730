"""What a run computes and moves, over the network, from and to storage. Counted from shapes, for
`--dry-run`.

Gradients and weights are counted at 4 bytes a parameter, all of them trained: the most that it can
be. (Mixed precision halves what ZeRO moves of matrices.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raybert.config import Recipe
from raybert.data import TaskData, steps_per_epoch

WORD = 4
"""Bytes of a weight, a gradient or one of Adam's moments: raybert keeps them in float32."""

PACE = 1e14
"""FLOPs a second that a device is taken to sustain: what a good kernel gets of an A100 in bf16."""

TOKEN = 5
"""Bytes of a token on disk: an int32 for its id, an int8 for its type."""


def network_bytes(parameters: int, workers: int, accumulation: int = 1) -> dict[int, int]:
    """Bytes that each worker sends in one optimiser step, by ZeRO stage (as many come in).

    An all-reduce of G bytes around a ring sends 2 (N-1)/N G of them, a reduce-scatter or an
    all-gather half as many. Stage 0 reduces gradients once a step; stage 1 scatters them and
    gathers the updated weights. Stage 2 scatters in each forward and backward pass, since no worker
    keeps the others' parts to add to. Stage 3 also gathers weights twice in each pass, for its two
    directions (Rajbhandari et al. 2020, section 7).

    Args:
        parameters: trained ones.
        workers: N.
        accumulation: passes a step.
    """
    part = WORD * parameters * (workers - 1) // workers
    return {
        0: 2 * part,
        1: 2 * part,
        2: (accumulation + 1) * part,
        3: 3 * accumulation * part,
    }


def checkpoint_bytes(parameters: int) -> int:
    """A checkpoint's size: weights and Adam's two moments. The best weights so far are a second
    name of a file that is there already."""
    return 3 * WORD * parameters


def prediction_bytes(rows: int, outputs: float, layers: int, hidden: int) -> int:
    """Size of a teacher's saved predictions.

    Args:
        rows: how many.
        outputs: float32 outputs of a row: labels, or for QA two for each token.
        layers: whose [CLS] states are kept in float16; 0 for none.
        hidden: their width.
    """
    return round(rows * (4 * outputs + 2 * layers * hidden + 8))


def step_flops(student: float, teacher: float, rows: float) -> float:
    """FLOPs of one optimiser step over all workers.

    A backward pass counts as two forward passes: one for the gradients of what came in, one for
    those of the weights.

    Args:
        student: of a row's forward pass.
        teacher: likewise; 0 where it does not run beside the student.
        rows: of the step.
    """
    return rows * (3 * student + teacher)


@dataclass(frozen=True)
class Load:
    """What a run computes and moves.

    Attributes:
        flops: of one step, all workers together.
        steps: of all phases.
        workers: training processes.
        zero: the run's ZeRO stage.
        network: bytes that each worker sends a step, by ZeRO stage.
        read: bytes of tokens that all workers read a step.
        checkpoint: bytes of one checkpoint.
        save_every: steps between two.
        predictions: bytes of the teacher's saved predictions; 0 where none are kept.
    """

    flops: float
    steps: int
    workers: int
    zero: int
    network: dict[int, int]
    read: int
    checkpoint: int
    save_every: int
    predictions: int

    def lines(self) -> list[str]:
        """The same in words."""
        total = self.flops * self.steps
        hours = total / PACE / 3600
        told = [
            f"compute   {_operations(self.flops)} a step, {_operations(total)} in all: "
            f"{hours:.3g} device-hours at {_operations(PACE)} a second"
        ]
        if self.workers > 1:
            stages = ", ".join(f"{amount(b)} at ZeRO {s}" for s, b in self.network.items())
            told.append(f"network   each worker sends, a step: {stages}; here ZeRO {self.zero}")
        told.append(
            f"storage   {amount(self.read)} read a step; a checkpoint of {amount(self.checkpoint)} "
            f"every {self.save_every} steps ({amount(self.checkpoint / self.save_every)} a step), "
            "the last two are kept"
        )
        if self.predictions:
            told.append(f"teacher   its predictions take {amount(self.predictions)} in data.cache")
        return told


def load_of(
    recipe: Recipe,
    data: TaskData,
    parameters: int,
    length: int,
    flops: tuple[float, float],
    steps: int,
    teacher: Any,
) -> Load:
    """What a recipe's run computes and moves.

    Args:
        recipe: resolved.
        data: its rows.
        parameters: the most that a phase trains.
        length: tokens of the row that FLOPs are of.
        flops: of that row: the most that a phase's student does, and those of the teacher beside
            it. They are taken to grow with the tokens; attention's part, small at these lengths,
            grows faster.
        steps: of all phases.
        teacher: the Hugging Face config of the teacher whose predictions are saved, if they are.
    """
    train, lengths = recipe.train, data.lengths("train")
    each = steps_per_epoch(len(lengths), train.batch_size, train.accumulation, recipe.workers)
    kept = 0
    if teacher is not None:
        outputs = 2 * lengths.mean() if data.task.kind == "qa" else data.task.num_labels
        layers = teacher.num_hidden_layers if recipe.kd.cls else 0
        kept = prediction_bytes(len(lengths), outputs, layers, teacher.hidden_size)
    rows, shorter = min(train.batch_size, len(lengths)), lengths.mean() / length
    return Load(
        flops=step_flops(flops[0] * shorter, flops[1] * shorter, rows),
        steps=steps,
        workers=recipe.workers,
        zero=train.zero,
        network=network_bytes(parameters, recipe.workers, train.accumulation),
        read=round(TOKEN * lengths.mean() * rows),
        checkpoint=checkpoint_bytes(parameters),
        save_every=each if train.save_every == "epoch" else train.save_every,
        predictions=kept,
    )


def amount(count: float) -> str:
    """Bytes in the unit that suits them: ``17.4 MB`` of 10^6."""
    return _in_units(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}, "bytes")


def _operations(count: float) -> str:
    return _in_units(count, {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9}, "FLOP")


def _in_units(count: float, units: dict[str, float], plain: str) -> str:
    for unit, size in units.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} {plain}"
