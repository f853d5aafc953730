"""How a search shares a machine or cluster out: what each trial gets, and how many run at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raybert.config import Recipe
from raybert.errors import UserError

LIBRARIES = 700_000_000
"""Bytes that a process takes before it has loaded a model, about."""


@dataclass(frozen=True)
class Shares:
    """What trials get.

    Attributes:
        cpus: of each worker.
        gpu: GPUs of each worker; of a trial of one worker perhaps a share of one; 0: none.
        concurrent: trials that run at once.
    """

    cpus: int
    gpu: float
    concurrent: int

    def text(self, workers: int) -> str:
        """How many trials of so many workers run at once, and what each has."""
        gpu = f" and {self.gpu:g} GPU" if self.gpu else ""
        return (
            f"{self.concurrent} trials at once, {workers} worker(s) of {self.cpus} CPU(s){gpu} each"
        )


def share_out(
    recipe: Recipe,
    nodes: Sequence[tuple[int, int]],
    *,
    trials: int,
    concurrent: int | None = None,
    gpu: float = 1.0,
    memory: int = 0,
    free: int | None = None,
    gpu_memory: int | None = None,
) -> Shares:
    """Share nodes out among trials, so that all that are started can run: none waits for another.

    How many run at once is settled first, by GPUs, memory and what was asked for: where
    `resources.cpus` leaves it open, each of them then gets as many CPUs as there are for it.

    Args:
        recipe: gives `workers` and `resources`.
        nodes: CPUs and GPUs of each machine; a worker lives on one.
        trials: how many there are to be.
        concurrent: how many may run at once; None: as many as fit.
        gpu: GPUs of a trial of one worker; a worker among several has a whole one.
        memory: bytes that a worker needs beside its libraries; 0: not known.
        free: bytes that there are; None: not known.
        gpu_memory: bytes that a GPU has; None: not known.

    Raises:
        UserError: not one trial fits, or not as many at once as were asked for; it says what fits.
    """
    workers, total = recipe.workers, sum(cpu for cpu, _ in nodes)
    check_gpu(gpu)
    each = gpu if workers == 1 else 1.0
    on_gpu = recipe.resources.gpu
    if on_gpu is None:
        on_gpu = slots(nodes, 1, each) >= workers
    share = each if on_gpu else 0.0
    if 0 < share < 1 and gpu_memory and memory > share * gpu_memory:
        raise UserError(
            f"a trial needs about {memory / 2**30:.1f} GiB, and --gpu {share:g} is "
            f"{share * gpu_memory / 2**30:.1f} GiB of a GPU's {gpu_memory / 2**30:.1f}. Use a "
            "larger --gpu, 1 at most, or a smaller train.batch_size."
        )
    cpus = recipe.resources.cpus or 1
    fits = slots(nodes, cpus, share) // workers
    what = f"{workers} worker{'s' if workers > 1 else ''} of {cpus} CPU{'s' if cpus > 1 else ''}"
    what += f" and {share:g} GPU" if share else ""
    there = f"{total} CPUs and {sum(g for _, g in nodes)} GPUs on {len(nodes)} machine(s)"
    if fits < 1:
        raise UserError(
            f"a trial of {what} fits nowhere: there are {there}. It would wait for ever; "
            f"{_what_would_fit(recipe, slots(nodes, 1, share), on_gpu)}."
        )
    mend = "fewer workers or fewer resources.cpus"
    if memory and free is not None and not on_gpu:
        # Several workers are watched by one process more.
        needed = workers * (memory + LIBRARIES) + (LIBRARIES if workers > 1 else 0)
        if free // needed < fits:
            fits = max(1, free // needed)
            there += f", and {free / 2**30:.1f} GiB for trials of {needed / 2**30:.1f} GiB"
            mend = "a smaller train.batch_size"
    if concurrent and concurrent > fits:
        raise UserError(
            f"{concurrent} trials at once of {what} do not fit: there are {there}. Use at most "
            f"--concurrent {fits}, {mend}."
        )
    at_once = min(fits, trials, concurrent or fits)
    if recipe.resources.cpus is None:
        cpus = most_cpus(nodes, workers * at_once, share)
    return Shares(cpus, share, at_once)


def _what_would_fit(recipe: Recipe, most: int, on_gpu: bool) -> str:
    """How to mend a trial that fits nowhere; ``most``: workers of one CPU that do."""
    mends = [f"at most workers={most}"] if 0 < most < recipe.workers else []
    mends += ["fewer resources.cpus"] if (recipe.resources.cpus or 1) > 1 else []
    mends += ["resources.gpu=false"] if on_gpu else []
    wait = recipe.resources.wait
    asked = f"a larger resources.wait than {wait:g}" if wait else "resources.wait=15"
    mends.append(f"{asked} where a cluster starts machines on demand")
    return f"use {', or '.join(mends)}"


def check_gpu(gpu: float) -> None:
    """Refuse a share of a GPU that there is not.

    Raises:
        UserError: it is not above 0, or above 1.
    """
    if not 0 < gpu <= 1:
        raise UserError(
            f"a trial's share of a GPU is {gpu:g}; use more than 0, and 1 at most, as in --gpu 0.5."
        )


def most_cpus(nodes: Sequence[tuple[int, int]], workers: int, gpu: float = 0.0) -> int:
    """The most CPUs, 1 at least, that so many workers can all have: those of one are of one
    machine."""
    most = max((cpu for cpu, _ in nodes), default=1)
    return next((n for n in range(most, 1, -1) if slots(nodes, n, gpu) >= workers), 1)


def slots(nodes: Sequence[tuple[int, int]], cpus: int, gpu: float) -> int:
    """Workers that find room on machines of so many CPUs and GPUs: each within one machine, and
    within one GPU."""
    a_gpu = int(1 / gpu + 1e-9) if gpu else 0
    return sum(min(cpu // cpus, gpus * a_gpu) if gpu else cpu // cpus for cpu, gpus in nodes)
