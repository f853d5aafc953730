"""Batches: which rows go together, their padded tensors, and a thread that keeps some of them
ahead."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raybert.errors import UserError
from raybert.features import TokenInfo
from raybert.tasks import IGNORED, Task

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "labels",
    "start_positions",
    "end_positions",
)
"""The keys of a batch that a model's ``forward`` takes; the others are for the loop and the
metrics."""

MEGA = 50
"""Batches' worth of rows that are sorted by length together: enough to save padding, few enough to
stay shuffled."""


def steps_per_epoch(n_rows: int, batch_size: int, accumulation: int, world_size: int) -> int:
    """Optimiser steps of one pass over the rows, as ``train_steps`` plans them.

    Raises:
        UserError: there are fewer rows in a batch, or in all, than forward passes in a step.
    """
    chunks = accumulation * world_size
    if batch_size < chunks:
        raise UserError(
            f"train.batch_size={batch_size} is fewer rows than the {chunks} forward passes of a "
            f"step ({world_size} worker(s) x train.accumulation={accumulation}); use "
            f"train.batch_size={chunks} or more."
        )
    if n_rows < chunks:
        raise UserError(
            f"{n_rows} training rows are fewer than the {chunks} forward passes of a step "
            f"({world_size} worker(s) x train.accumulation={accumulation}); use fewer workers or "
            "more rows."
        )
    whole, rest = divmod(n_rows, batch_size)
    return whole + (rest >= chunks)


def train_steps(
    lengths: np.ndarray,
    *,
    batch_size: int,
    accumulation: int,
    world_size: int,
    most: int | None = None,
    seed: int,
    epoch: int,
) -> list[list[list[np.ndarray]]]:
    """Plan one epoch: rows of like length share a batch, in an order drawn from the seed and the
    epoch.

    Which rows make up a step depends on neither ``world_size`` nor ``accumulation``, only how they
    are shared out does. Each row is used once, but for the last few when they are fewer than a
    step's forward passes.

    Args:
        lengths: tokens of each row, [N].
        batch_size: rows of an optimiser step over all workers and forward passes.
        world_size: workers that share each step.
        most: workers there may be at other times, for whom there must be as many steps; nothing:
            always the same.

    Returns:
        For each step, for each of its ``accumulation`` forward passes, for each worker: positions
        of its rows. Their counts differ by one at most.
    """
    most = max(world_size, most or 0)
    steps_per_epoch(len(lengths), batch_size, accumulation, most)
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(lengths))
    whole = len(order) - len(order) % batch_size
    batches = []
    for first in range(0, whole, MEGA * batch_size):
        rows = order[first : min(first + MEGA * batch_size, whole)]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    rest = order[whole:]
    if len(rest):
        batches.append(rest[np.argsort(lengths[rest], kind="stable")])
    steps = [batches[i] for i in draw.permutation(len(batches))]
    chunks = accumulation * most
    return [_share(rows, accumulation, world_size) for rows in steps if len(rows) >= chunks]


def _share(rows: np.ndarray, accumulation: int, world_size: int) -> list[list[np.ndarray]]:
    """Rows in order of length: neighbours share a forward pass, and each worker gets as long rows
    as the next."""
    passes = np.array_split(rows, accumulation)
    return [[part[rank::world_size] for rank in range(world_size)] for part in passes]


def eval_batches(
    lengths: np.ndarray, batch_size: int, world_size: int, rank: int
) -> list[np.ndarray]:
    """One worker's share of the rows, longest first; over all ranks every row is there exactly
    once.

    Args:
        lengths: tokens of each row, [N].
        batch_size: rows of a forward pass on each worker.

    Returns:
        Positions of each batch's rows; no batch at all when there are fewer rows than workers.
    """
    mine = np.argsort(-lengths.astype(np.int64), kind="stable")[rank::world_size]
    return [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]


class Batcher:
    """Builds padded batches from one split's tokens, which stay where they lie: mapped from disk,
    and shared with the machine's other workers.

    Args:
        dataset: features as ``prepare`` stores them.
        tokens: of the tokenizer that made them.
        seed: draws the masks of masked language modelling, together with the epoch and the token's
            place.
    """

    def __init__(
        self, dataset: datasets.Dataset, task: Task, tokens: TokenInfo, *, seed: int = 0
    ) -> None:
        table: pa.Table = dataset.with_format("arrow")[:]  # type: ignore[assignment]
        self.task, self.tokens, self.seed = task, tokens, seed
        self.lengths = np.asarray(table["length"]).astype(np.int64)  # [N]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])  # [N + 1]
        self.ids = _Tokens(table["input_ids"])
        self.types = _Tokens(table["token_type_ids"]) if tokens.token_types else None
        plain = (
            "index",
            "labels",
            "start_positions",
            "end_positions",
            "context_start",
            "context_end",
        )
        self.columns = {name: _column(table, name) for name in plain if name in table.column_names}
        self.special = np.zeros(tokens.vocab_size, dtype=bool)
        self.special[list(tokens.special_ids)] = True

    def __len__(self) -> int:
        return len(self.lengths)

    def __call__(self, positions: np.ndarray, *, epoch: int = 0) -> dict[str, Tensor]:
        """The batch of the rows at ``positions``, padded to the longest of them.

        Returns:
            ``input_ids``, ``attention_mask``, ``token_type_ids`` if any [B, T]; ``index`` [B]; and
            ``labels`` ([B] for classes and numbers, [B, C] for multi-label, [B, T] for mlm), or
            ``start_positions`` and ``end_positions`` [B], unless the rows have none; for QA also
            ``context_mask`` [B, T].
        """
        lengths = self.lengths[positions]
        columns = np.arange(lengths.max())  # [T]
        real = columns < lengths[:, None]  # [B, T]
        ids = self.ids.padded(positions, lengths, self.tokens.pad_id)
        batch = {"attention_mask": real.astype(np.int64)}
        if self.types is not None:
            batch["token_type_ids"] = self.types.padded(positions, lengths, 0)
        for name in ("index", "labels", "start_positions", "end_positions"):
            if name in self.columns:
                batch[name] = self.columns[name][positions]
        if self.task.kind == "qa":
            first = self.columns["context_start"][positions][:, None]
            last = self.columns["context_end"][positions][:, None]
            batch["context_mask"] = (columns >= first) & (columns < last)
        if self.task.kind == "mlm":
            places = np.where(real, self.offsets[positions][:, None] + columns, 0)
            ids, batch["labels"] = self._masked(ids, places, real, epoch)
        batch["input_ids"] = ids
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _masked(
        self, ids: np.ndarray, places: np.ndarray, real: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """BERT's masking: of the chosen tokens 80 % become the mask, 10 % any token, 10 % stay."""
        open_ = real & ~self.special[ids]  # [B, T]
        chance = _uniform(places, self.seed, epoch, 0)
        chance = np.where(open_, chance, 2.0)
        # A row always asks for a token, or a batch of short rows could have no loss at all.
        chosen = (chance < self.task.mask) | (chance == chance.min(axis=1, keepdims=True))
        chosen &= open_
        labels = np.where(chosen, ids, IGNORED)
        fate = _uniform(places, self.seed, epoch, 1)
        anything = _uniform(places, self.seed, epoch, 2) * self.tokens.vocab_size
        ids = np.where(chosen & (fate < 0.8), self.tokens.mask_id or 0, ids)
        ids = np.where(chosen & (fate >= 0.9), anything.astype(np.int64), ids)
        return ids, labels


class _Tokens:
    """A column of lists of numbers, in the record batches that it was written in."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.parts = [chunk.flatten().to_numpy() for chunk in chunks]  # no copies
        # Where each row begins in its part, and where each part's rows begin.
        offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self.begins = [part[:-1] - part[0] for part in offsets]
        self.first = np.cumsum([0, *map(len, self.begins)])

    def padded(self, positions: np.ndarray, lengths: np.ndarray, pad: int) -> np.ndarray:
        """Rows side by side, [B, T] as int64, ``pad`` after the end of each."""
        out = np.full((len(positions), lengths.max()), pad, dtype=np.int64)
        parts = np.searchsorted(self.first, positions, side="right") - 1
        for row, (at, part, length) in enumerate(zip(positions, parts, lengths, strict=True)):
            begin = self.begins[part][at - self.first[part]]
            out[row, :length] = self.parts[part][begin : begin + length]
        return out


def _column(table: pa.Table, name: str) -> np.ndarray:
    if pa.types.is_list(table.schema.field(name).type):
        return np.stack([np.asarray(v, dtype=np.float32) for v in table[name].to_pylist()])
    return table[name].to_numpy()


def _uniform(places: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the arguments alone, not on how rows are batched
    (SplitMix64's mixer).

    One generator a row would cost more than the rest of the batch.
    """
    start = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    x = places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Prefetch:
    """Iterates over batches that a thread builds ahead.

    Attributes:
        waited: seconds that the consumer has spent waiting for a batch.
    """

    def __init__(
        self,
        batcher: Callable[..., dict[str, Tensor]],
        plan: Iterable[np.ndarray],
        *,
        epoch: int = 0,
        ahead: int = 3,
        pin: bool = False,
    ) -> None:
        self.waited = 0.0
        self._ready: queue.Queue[dict[str, Tensor] | Exception | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._build, args=(batcher, plan, epoch, pin), name="prefetch", daemon=True
        )
        self._thread.start()

    def _build(
        self,
        batcher: Callable[..., dict[str, Tensor]],
        plan: Iterable[np.ndarray],
        epoch: int,
        pin: bool,
    ) -> None:
        try:
            for positions in plan:
                batch = batcher(positions, epoch=epoch)
                if pin:
                    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
                if not self._put(batch):
                    return
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, item: dict[str, Tensor] | Exception | None) -> bool:
        """Hand an item over; False once the consumer has stopped."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        try:
            while True:
                asked = time.perf_counter()
                item = self._ready.get()
                self.waited += time.perf_counter() - asked
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread; done by itself when the iteration ends or is left."""
        self._stop.set()
        self._thread.join()


def prefetch(
    batcher: Callable[..., dict[str, Tensor]],
    plan: Iterable[np.ndarray],
    *,
    epoch: int = 0,
    ahead: int = 3,
    pin: bool = False,
) -> Prefetch:
    """Batches of ``plan`` (positions of each batch's rows), built by a thread that stays ``ahead``
    of the consumer.

    Args:
        batcher: builds the batch of some rows: a `Batcher`, or what adds to its batches.
        epoch: draws the masks of masked language modelling.
        pin: put the tensors into page-locked memory, for asynchronous copies to a GPU.

    Returns:
        An iterable whose ``waited`` counts the seconds lost to waiting. What fails in the thread is
        raised in the consumer.
    """
    return Prefetch(batcher, plan, epoch=epoch, ahead=ahead, pin=pin)
