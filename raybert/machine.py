"""What this process may use of its machine, and the cluster that it trains on instead."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container its limits (control groups, version 2)."""


def own_cores() -> int:
    """CPU cores that this process may use, which in a container are fewer than the machine has: of
    a limit, such as Kubernetes' of 2.5, the whole ones, and 1 at least."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota, _, period = _told("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores


def own_memory() -> tuple[int, int]:
    """Bytes of memory that are free for this process, and all that it may use: in a container,
    those that it is limited to."""
    machine = psutil.virtual_memory()
    limit = _told("memory.max")
    if not limit.isdigit():
        return machine.available, machine.total
    total = min(machine.total, int(limit))
    # What files keep in memory gives way, as it does in what is free of a machine.
    kept = dict(line.split() for line in _told("memory.stat").splitlines()).get("inactive_file", 0)
    used = int(_told("memory.current") or 0) - int(kept)
    return max(0, min(machine.available, total - used)), total


def _told(name: str) -> str:
    """What a file of the control group says; nothing where there is none."""
    try:
        return (CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def cluster_address() -> str | None:
    """The cluster that training runs on: RAY_ADDRESS names it, or this process has connected to it;
    None: this machine alone, in a Ray of its own or without one."""
    if "RAY_ADDRESS" in os.environ:
        return os.environ["RAY_ADDRESS"]
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    if ray.util.client.ray.is_connected():
        return "ray://"
    # A Ray that a notebook has started is this machine all the same.
    several = sum(node["Alive"] for node in ray.nodes()) > 1
    return ray.get_runtime_context().gcs_address if several else None
