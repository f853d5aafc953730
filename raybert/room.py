"""A search's room on a cluster: machines that are started for it, and the folder that all see."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import Any

from raybert.cluster import machines, wants_gpu
from raybert.config import Recipe
from raybert.errors import UserError
from raybert.shares import Shares

TURN = 5.0
"""Seconds that are waited for room at a time."""

SEEN = 120
"""Seconds in which machines are heard that are asked whether they see a folder."""


def wait_for_room(recipe: Recipe, trials: int, gpu: float) -> None:
    """Ask the cluster for room for a search's trials, and wait until it has it, or for as long as
    `resources.wait` says: with less, fewer run at once.

    Args:
        recipe: what all trials share.
        trials: that may run at once.
        gpu: GPUs of a trial of one worker.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    resources = recipe.resources
    each = {"CPU": float(resources.cpus or 1)}
    if wants_gpu(recipe, sum(gpus for _, gpus in machines())):
        each["GPU"] = gpu if recipe.workers == 1 else 1.0
    end = time.monotonic() + 60 * resources.wait
    # A group a trial: of one for all, or of `request_resources`, a cluster that may not grow so far
    # starts no machine at all.
    groups = [placement_group([dict(each)] * recipe.workers) for _ in range(trials)]
    try:
        for group in groups:
            # In short turns: Ctrl-C is not heard in between.
            while not group.wait(min(TURN, max(0.0, end - time.monotonic()))):
                if time.monotonic() >= end:
                    return
    finally:
        for group in groups:
            remove_placement_group(group)


def check_seen(file: Path) -> None:
    """Refuse a file's folder where a machine of the cluster that trials may run on does not see it.

    Raises:
        UserError: it names the machines; one that does not answer in time is left to its trials.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look: Any = ray.remote(num_cpus=0)(_unless_seen)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=True) for node in nodes]
    asked = [look.options(scheduling_strategy=place).remote(file) for place in there]
    heard, _ = ray.wait(asked, num_returns=len(asked), timeout=SEEN)
    with contextlib.suppress(RayError):  # a machine that was lost in between
        if blind := sorted({host for host in ray.get(heard) if host}):
            raise UserError(
                f"{file.parent} cannot be seen from {', '.join(blind)}, where trials would run: "
                "`out` must be on storage that all machines share, and data.cache too."
            )


def held_by_others(shares: Shares, workers: int) -> str:
    """That trials will wait, where others hold what they need; nothing where there is room.

    Args:
        shares: what trials get.
        workers: of each trial.
    """
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    at_once = shares.concurrent * workers
    for what, needed in (("CPU", at_once * shares.cpus), ("GPU", at_once * shares.gpu)):
        held = there.get(what, 0) - free.get(what, 0)
        if needed > free.get(what, 0):
            return (
                f"others hold {held:g} of the cluster's {there.get(what, 0):g} {what}s, and all "
                f"trials at once take {needed:g}: some wait until there is room"
            )
    return ""


def _unless_seen(file: Path) -> str:
    """This machine's name where it does not see a file."""
    return "" if file.is_file() else socket.gethostname()
