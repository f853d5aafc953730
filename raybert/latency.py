"""Latency by the clock: every model in a process of its own, all alive at once, running in turns.

Two sessions in one process share thread pools and slow each other; two models timed one after the
other catch different moods of the machine. So each model gets a child process (``python -m
raybert.timer``), and the parent hands out turns: a short block for A, one for B, again A, again B.
Only one child computes at any time, the others sleep on a pipe, and drift (heat, frequency,
neighbours) falls on all alike.

Parent and child speak one JSON object a line. A child whose standard input closes exits at once, so
that none outlives its parent, however that one ended.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from raybert.config import UserError

Backend = Literal["torch", "onnx"]

ROUNDS = 6
"""Turns that each model gets for a shape."""

LEAST_REPEATS = 10
"""Timed forward passes a shape and model, however slow the model."""

MOST_REPEATS = 2000
"""And at most, however fast: the median has long settled."""


class Timed(Protocol):
    """What the turns are given to: a child process, or a stand-in in a test."""

    def turn(self, batch: int, length: int, repeats: int, warmup: int) -> dict[str, Any]:
        """Run ``warmup`` untimed, ``repeats`` timed passes: {"ms": [..], "peak_memory_mb": n}."""
        ...


def latency(
    models: Mapping[str, Path],
    shapes: Sequence[tuple[int, int]],
    *,
    backend: Backend = "torch",
    threads: int | None = None,
    device: str | None = None,
    repeats: int | None = None,
    warmup: int = 3,
    seconds: float = 3.0,
) -> list[dict[str, Any]]:
    """Time the forward passes of several models side by side.

    Inputs are random token ids, the same for all models of one vocabulary, with a full attention
    mask.

    Args:
        models: name -> model folder; for ``onnx`` a ``.onnx`` file, or a folder that holds
            ``model.onnx``.
        shapes: (batch, length) pairs, in tokens.
        backend: ``torch``: inference mode with SDPA; ``onnx``: ONNX Runtime on the CPU.
        threads: CPU threads of each model; nothing: as many as PyTorch would take here.
        device: of the ``torch`` backend; nothing: ``cuda`` where there is one, else ``cpu``.
        repeats: timed passes a shape and model; nothing: as many as fit in ``seconds``, at least
            10.
        warmup: untimed passes at the start of a shape; every later turn starts with one.
        seconds: timed seconds a shape and model.

    Returns:
        One row a shape and model: ``model``, ``backend``, ``device``, ``batch``, ``length``,
            ``p50_ms``, ``p95_ms``,
        ``mean_ms``, ``throughput`` (rows a second, at the median), ``repeats``, ``threads``,
        ``peak_memory_mb`` (the process's resident peak so far, libraries and loading included; on a
        GPU what PyTorch allocated there).

    Raises:
        UserError: a model cannot be loaded or run, or its process died.
    """
    _check(models, shapes, backend, repeats, device)
    threads = threads or _default_threads()
    rows = []
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(Child(name, path, backend, threads, device))
            for name, path in models.items()
        }
        devices = {name: child.ready() for name, child in children.items()}
        for batch, length in shapes:
            timed = alternate(children, (batch, length), repeats, warmup, seconds)
            rows += [
                {
                    "model": name,
                    "backend": backend,
                    "device": devices[name],
                    "batch": batch,
                    "length": length,
                    **_statistics(result["ms"], batch),
                    "threads": threads,
                    "peak_memory_mb": round(result["peak_memory_mb"], 1),
                }
                for name, result in timed.items()
            ]
    return rows


def alternate(
    children: Mapping[str, Timed],
    shape: tuple[int, int],
    repeats: int | None,
    warmup: int,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Hand out turns A, B, A, B, ... for one shape.

    Returns:
        For each name ``ms``, every timed pass in milliseconds, and the last ``peak_memory_mb``.
    """
    block = {}
    for name, child in children.items():
        # The first passes of a shape allocate, and choose kernels: one pass after them tells the
        # pace.
        trial = child.turn(*shape, repeats=1, warmup=warmup)["ms"][0]
        fitting = min(max(int(seconds * 1000 / max(trial, 1e-3)), LEAST_REPEATS), MOST_REPEATS)
        block[name] = _split(repeats or fitting)
    result: dict[str, dict[str, Any]] = {
        name: {"ms": [], "peak_memory_mb": 0.0} for name in children
    }
    for turn in range(ROUNDS):
        for name, child in children.items():
            if block[name][turn]:
                # What ran meanwhile has emptied the caches: the first pass of a turn is not timed.
                answer = child.turn(*shape, repeats=block[name][turn], warmup=1)
                result[name]["ms"] += answer["ms"]
                result[name]["peak_memory_mb"] = answer["peak_memory_mb"]
    return result


def speedups(rows: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """How many times faster than ``reference`` each model is, by medians of one shape and backend.

    Args:
        rows: what ``latency`` returned, of one or several backends.
        reference: the model that counts as 1.

    Returns:
        ``{"model", "backend", "batch", "length", "speedup"}`` for every row of another model.

    Raises:
        UserError: the reference was not timed in a shape and backend where another model was.
    """
    base = {
        (r["backend"], r["batch"], r["length"]): r["p50_ms"]
        for r in rows
        if r["model"] == reference
    }
    ratios = []
    for row in rows:
        if row["model"] == reference:
            continue
        key = (row["backend"], row["batch"], row["length"])
        if key not in base:
            raise UserError(
                f"{row['model']} was timed with {key[0]} at batch {key[1]} x {key[2]}, "
                f"{reference!r} was not; a speed-up needs both: time them in one call."
            )
        shown = {name: row[name] for name in ("model", "backend", "batch", "length")}
        ratios.append({**shown, "speedup": round(base[key] / row["p50_ms"], 3)})
    return ratios


def _check(
    models: Mapping[str, Path],
    shapes: Sequence[tuple[int, int]],
    backend: str,
    repeats: int | None,
    device: str | None,
) -> None:
    if backend not in get_args(Backend):
        raise UserError(f"no backend {backend!r}; known: {', '.join(get_args(Backend))}.")
    if backend == "onnx" and device not in (None, "cpu"):
        raise UserError(f"ONNX Runtime is timed on the CPU, not on {device!r}; leave the device.")
    if repeats is not None and repeats < 1:
        raise UserError(f"repeats is {repeats}; a latency needs at least 1 timed pass.")
    for batch, length in shapes:
        if batch < 1 or length < 1:
            raise UserError(
                f"shape {batch} x {length} holds no token; write batch and length from 1 on."
            )
    for name, path in models.items():
        if not Path(path).exists():
            raise UserError(f"{name}: no model at {path}; give a model folder or a .onnx file.")


def _default_threads() -> int:
    import torch

    return torch.get_num_threads()


def _split(repeats: int) -> list[int]:
    """``repeats`` over the rounds, as evenly as whole numbers allow, the larger shares first."""
    return [repeats // ROUNDS + (i < repeats % ROUNDS) for i in range(ROUNDS)]


def _statistics(ms: list[float], batch: int) -> dict[str, Any]:
    ordered = sorted(ms)
    p50 = statistics.median(ordered)
    # Nearest rank: the smallest time that 95 % of the passes did not exceed.
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {
        "p50_ms": round(p50, 4),
        "p95_ms": round(p95, 4),
        "mean_ms": round(statistics.fmean(ordered), 4),
        "throughput": round(batch * 1000 / p50, 2),
        "repeats": len(ordered),
    }


class Child:
    """One model in a process of its own, seen from the parent.

    A context manager: entering starts the process, leaving ends it.
    """

    def __init__(self, name: str, path: Path, backend: str, threads: int, device: str | None):
        self.name, self.path = name, Path(path)
        self._job = {
            "path": str(self.path.absolute()),
            "backend": backend,
            "threads": threads,
            "device": device,
        }
        # The pools read these when the libraries load, before any call could set them.
        count = str(threads)
        self._env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}

    def __enter__(self) -> Child:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raybert.timer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._env,
        )
        try:
            self._send(self._job)
        except UserError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._log.close()

    def ready(self) -> str:
        """Wait until the model is loaded; the device it is on."""
        return self._receive()["device"]

    def turn(self, batch: int, length: int, repeats: int, warmup: int) -> dict[str, Any]:
        """See ``Timed.turn``. Raises ``UserError`` when the child reports an error or is gone."""
        self._send({"batch": batch, "length": length, "repeats": repeats, "warmup": warmup})
        return self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        answer = json.loads(line)
        if "error" in answer:
            backend = self._job["backend"]
            raise UserError(
                f"{self.name}: {self.path} cannot be timed with {backend}: {answer['error']}"
            )
        return answer

    def _died(self) -> UserError:
        code = self.process.wait()
        self._log.seek(0)
        last = " ".join(self._log.read().split())[-500:]
        why = (
            "was killed, perhaps for want of memory" if code == -9 else f"ended with status {code}"
        )
        said = f" Its last words: {last}" if last else ""
        return UserError(f"{self.name}: the process timing {self.path} {why}.{said}")
