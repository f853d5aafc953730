"""Latency by the clock: every model in a process of its own, all alive at once, running in turns.

Two sessions in one process share thread pools and slow each other; two models timed one after the
other catch different moods of the machine. So each model gets a child process (``python -m
raybert.timer``), and the parent hands out turns: a short block for A, one for B, again A, again B.
Only one child computes at any time, the others sleep on a pipe, and drift (heat, frequency,
neighbours) falls on all alike.

Parent and child speak one JSON object a line. A child whose standard input closes exits at once, so
that none outlives its parent, however that one ended.

PyTorch and transformers take longer to load than most models. On Linux one process loads them, and
forks a child for each model.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Literal, Protocol, get_args

from raybert.errors import UserError

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
        shared = backend == "torch" and sys.platform == "linux" and len(models) > 1
        server = stack.enter_context(ForkServer(threads)) if shared else None
        children = {
            name: stack.enter_context(Child(name, path, backend, threads, device, server))
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


class ForkServer:
    """A process that has loaded PyTorch and transformers, and forks itself when asked (Linux).

    A context manager: entering starts the process, leaving ends it.
    """

    def __init__(self, threads: int):
        self._env = _environment(threads)

    def __enter__(self) -> ForkServer:
        self._socket, other = socket.socketpair()
        with other:
            number = other.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raybert.timer", str(number)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[number],
                env=self._env,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()

    def fork(self, stdin: int, stdout: int, stderr: int) -> None:
        """Have a child with these file descriptors; a server that died shows by what they give."""
        with suppress(OSError):
            socket.send_fds(self._socket, [b"."], [stdin, stdout, stderr])


class Child:
    """One model in a process of its own, seen from the parent.

    A context manager: entering starts the process, leaving ends it.

    Args:
        name: what errors call it.
        path: model folder, or ``.onnx`` file.
        backend: ``torch`` or ``onnx``.
        threads: CPU threads.
        device: of ``torch``.
        server: forks the process, where there is one; ``process`` is then nothing.
    """

    process: subprocess.Popen[Any] | None = None

    def __init__(
        self,
        name: str,
        path: Path,
        backend: str,
        threads: int,
        device: str | None,
        server: ForkServer | None = None,
    ):
        self.name, self.path = name, Path(path)
        self._job = {
            "path": str(self.path.absolute()),
            "backend": backend,
            "threads": threads,
            "device": device,
        }
        self._server = server

    def __enter__(self) -> Child:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        asked, self._asks = _pipe()
        self._answers, answered = _pipe()
        ends: tuple[IO[str], ...] = asked, answered, self._log
        with asked, answered:
            if self._server:
                self._server.fork(*(end.fileno() for end in ends))
            else:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "raybert.timer"],
                    stdin=asked,
                    stdout=answered,
                    stderr=self._log,
                    env=_environment(self._job["threads"]),
                )
        try:
            self._send(self._job)
        except UserError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        for end in (self._asks, self._answers, self._log):
            with suppress(BrokenPipeError):  # what was never sent
                end.close()

    def ready(self) -> str:
        """Wait until the model is loaded; the device it is on."""
        return self._receive()["device"]

    def turn(self, batch: int, length: int, repeats: int, warmup: int) -> dict[str, Any]:
        """See ``Timed.turn``. Raises ``UserError`` when the child reports an error or is gone."""
        self._send({"batch": batch, "length": length, "repeats": repeats, "warmup": warmup})
        return self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._asks.write(json.dumps(message) + "\n")
            self._asks.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
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
        self._log.seek(0)
        last = " ".join(self._log.read().split())[-500:]
        said = f" Its last words: {last}" if last else " Perhaps it was killed for want of memory."
        return UserError(f"{self.name}: the process timing {self.path} ended.{said}")


def _pipe() -> tuple[IO[str], IO[str]]:
    read, write = os.pipe()
    return os.fdopen(read), os.fdopen(write, "w")


def _environment(threads: int) -> dict[str, str]:
    # The pools read these when the libraries load, before any call could set them.
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
