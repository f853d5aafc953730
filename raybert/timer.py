"""The child process of ``raybert.latency``: loads one model, runs blocks of passes when told to.

Started as ``python -m raybert.timer``, it reads one JSON object a line and answers each with one.
When its standard input closes it exits at once, whatever it is doing.

With the number of a socket (``python -m raybert.timer 5``) it loads the libraries and becomes a
child each time that the socket brings standard input, output and error for one.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from raybert.errors import UserError

LONGEST = "longest_input"
"""Metadata of an exported graph: tokens that a row may have."""


class TorchModel:
    """A Hugging Face folder, plain or compressed, in inference mode and with its own attention."""

    def __init__(self, job: dict[str, Any]):
        import torch

        from raybert.compressed import longest_input
        from raybert.models import load

        torch.set_num_threads(job["threads"])
        self.device = job["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(Path(job["path"])).eval()
        self.model.to(torch.device(self.device))  # pyright: ignore[reportArgumentType]
        self.vocab: int = self.model.config.vocab_size
        self.positions = longest_input(self.model.config)

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        """Token ids and a full mask on the model's device  # [batch, length] each"""
        import torch

        ids = torch.tensor(token_ids(batch, length, self.vocab), device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def milliseconds(self, inputs: dict[str, Any], repeats: int) -> list[float]:
        """One number a forward pass; on a GPU until its last kernel has ended."""
        import torch

        wait = torch.cuda.synchronize if self.device.startswith("cuda") else (lambda: None)
        times = []
        with torch.inference_mode():
            for _ in range(repeats):
                wait()
                start = time.perf_counter()
                self.model(**inputs)
                wait()
                times.append((time.perf_counter() - start) * 1000)
        return times

    def peak_memory_mb(self) -> float:
        """Peak of the GPU's allocator, or of the process, in MB of 10^6 bytes."""
        import torch

        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated() / 1e6
        return process_peak_mb()


class OnnxModel:
    """An ONNX file in ONNX Runtime on the CPU; ``config.json`` beside it tells the vocabulary."""

    device = "cpu"

    def __init__(self, job: dict[str, Any]):
        try:
            import onnxruntime as ort
        except ModuleNotFoundError:
            raise UserError(
                "onnxruntime is not installed; run: pip install 'raybert[onnx]'"
            ) from None
        path = Path(job["path"])
        file = path / "model.onnx" if path.is_dir() else path
        config = file.with_name("config.json")
        for wanted in (file, config):
            if not wanted.is_file():
                raise UserError(f"no {wanted}; export the model first: raybert export")
        known = json.loads(config.read_text(encoding="utf-8"))
        self.vocab: int = known["vocab_size"]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
        # Threads may spin while a pass runs, as in production, and stop when it ends: between turns
        # they would burn the cores that another model is being timed on.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        # A graph of raybert's says itself what it reads.
        told = self.session.get_modelmeta().custom_metadata_map
        self.positions = int(told.get(LONGEST, known["max_position_embeddings"]))

    def inputs(self, batch: int, length: int) -> dict[str, Any]:
        """The arrays that the graph asks for  # [batch, length] each"""
        import numpy as np

        ids = np.array(token_ids(batch, length, self.vocab))
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
        wanted = self.session.get_inputs()
        for entry in wanted:
            if entry.name not in known or entry.type not in kinds:
                raise UserError(
                    f"the graph wants an input {entry.name} of {entry.type}; only whole-numbered "
                    f"{', '.join(known)} can be made up."
                )
        return {entry.name: known[entry.name].astype(kinds[entry.type]) for entry in wanted}

    def milliseconds(self, inputs: dict[str, Any], repeats: int) -> list[float]:
        """One number a forward pass."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            self.session.run(None, inputs)
            times.append((time.perf_counter() - start) * 1000)
        return times

    def peak_memory_mb(self) -> float:
        """Peak of the process in MB of 10^6 bytes."""
        return process_peak_mb()


BACKENDS = {"torch": TorchModel, "onnx": OnnxModel}


def token_ids(batch: int, length: int, vocab: int) -> list[list[int]]:
    """Random ids below ``vocab``, the same in every process  # [batch, length]"""
    draw = random.Random(f"{batch}x{length}")
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(batch)]


def process_peak_mb() -> float:
    """The largest resident size that this process has had, in MB of 10^6 bytes."""
    if sys.platform == "linux":
        # Not getrusage: after exec its peak still counts the parent's memory.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _listen(inbox: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        inbox.put(json.loads(line))
    # The parent is gone, whatever this process is doing.
    os._exit(0)


def _serve(inbox: queue.Queue[dict[str, Any]], answer: Any) -> None:
    job = inbox.get()
    model = BACKENDS[job["backend"]](job)
    # What is there now stays: looking through all the libraries' objects at every turn took longer
    # than the turn.
    gc.collect()
    gc.freeze()
    answer({"device": model.device})
    while True:
        ask = inbox.get()
        if ask["length"] > model.positions:
            raise UserError(
                f"length {ask['length']} is more than its {model.positions} positions; ask less."
            )
        inputs = model.inputs(ask["batch"], ask["length"])
        model.milliseconds(inputs, ask["warmup"])
        gc.collect()
        gc.disable()
        times = model.milliseconds(inputs, ask["repeats"])
        gc.enable()
        answer({"ms": times, "peak_memory_mb": model.peak_memory_mb()})


def _child() -> None:
    """Load one model, then run a block whenever the parent says so."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # What libraries print must not end up between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    inbox: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    try:
        _serve(inbox, answer)
    except UserError as error:
        answer({"error": str(error)})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})


def _fork(asks: socket.socket) -> None:
    """Fork until the socket closes; returns in the children, and not in the server."""
    import raybert.methods
    import raybert.models  # noqa: F401

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets children that ended
    while True:
        message, descriptors, *_ = socket.recv_fds(asks, 1, 3)
        if not message:
            os._exit(0)
        child = os.fork() == 0
        for place, descriptor in enumerate(descriptors):
            if child:
                os.dup2(descriptor, place)
            os.close(descriptor)
        if child:
            asks.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return


def main() -> None:
    """A child; or, given a socket, what forks into children."""
    if len(sys.argv) > 1:
        _fork(socket.socket(fileno=int(sys.argv[1])))
    _child()


if __name__ == "__main__":
    main()
