"""What a model costs: parameters, bytes on disk, floating-point operations, and time by the clock.

    raybert bench runs/demo-theseus --against runs/demo-teacher

Counting needs the model, timing its folder: each model is timed in a process of its own
(``raybert.latency``).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raybert.compressed import longest_input
from raybert.errors import UserError
from raybert.int8 import Int8Embedding, Quantised
from raybert.latency import Backend, latency, speedups
from raybert.models import PROBE
from raybert.tables import escape_markdown, markdown_table
from raybert.timer import token_ids

__all__ = [
    "bench",
    "disk_bytes",
    "flops",
    "format_bench",
    "hardware",
    "latency",
    "parameters",
    "speedups",
]

SHAPES = ((1, 128), (8, 128))
"""(batch, length) pairs that are timed unless others are asked for."""

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)
"""Integer weights; int64 buffers hold positions and counters, not weights."""


def parameters(model: torch.nn.Module) -> dict[str, int]:
    """Count the weights, tied ones once.

    Integer weights live in buffers: every persistent buffer of at most 32-bit integers that is not
    a scalar counts.

    Returns:
        ``total``; ``embeddings``, the weights of embedding tables; ``rest``, what is left.
    """
    weights = dict(model.named_parameters())  # tied tensors come once
    saved = model.state_dict(keep_vars=True)
    integer = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in saved and buffer.dtype in INTEGERS and buffer.dim() > 0
    }
    quantised = [module for module in model.modules() if isinstance(module, Quantised)]
    # Several to a byte where they are packed.
    held = {id(m.weight): m.rows * m.columns for m in quantised if "weight" in m._buffers}
    tensors = (*weights.values(), *integer.values())
    total = sum(held.get(id(tensor), tensor.numel()) for tensor in tensors)
    tables = {
        id(module.weight): held.get(id(module.weight), module.weight.numel())
        for module in model.modules()
        if isinstance(module, (torch.nn.Embedding, Int8Embedding))
    }
    embeddings = sum(tables.values())
    return {"total": total, "embeddings": embeddings, "rest": total - embeddings}


def disk_bytes(folder: Path) -> dict[str, int]:
    """Bytes of a model folder: ``weights``, its ``*.safetensors`` but for the stored probe;
    ``embeddings``, the tables in them; ``total``, all its files.

    Raises:
        UserError: there is no such folder, or it holds no safetensors file.
    """
    folder = Path(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    shards = [file for file in folder.glob("*.safetensors") if file.name != PROBE]
    weights = sum(file.stat().st_size for file in shards)
    if not weights:
        raise UserError(f"{folder} holds no *.safetensors file; give a model folder.")
    embeddings = 0
    for shard in shards:
        with safe_open(shard, "pt") as tensors:  # mapped, not read
            names = [name for name in tensors.keys() if ".embeddings." in name]  # noqa: SIM118
            embeddings += sum(tensors.get_tensor(name).nbytes for name in names)
    total = sum(file.stat().st_size for file in files)
    return {"weights": weights, "embeddings": embeddings, "total": total}


def flops(model: torch.nn.Module, batch: int = 1, length: int = 128) -> int:
    """Floating-point operations of one forward pass; a multiply-add counts as 2.

    Matrix products and convolutions are counted, element-wise work is not. Integer products count
    like floating-point ones: the number tells the work, not its speed.

    Args:
        model: a Hugging Face model, on the meta device too; it is left as it was.
        batch: rows.
        length: tokens a row, none of them padding.

    Raises:
        UserError: the model has fewer positions than that.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    most = longest_input(config)
    if length > most:
        raise UserError(
            f"length {length} is more than the model's {most} positions; ask for a shorter one."
        )
    ids = torch.tensor(token_ids(batch, length, config.vocab_size), device=device)
    integer = {torch.ops.aten._int_mm: _product_flops}  # raybert's own is registered with it
    counter = FlopCounterMode(display=False, custom_mapping=integer)
    training = model.training
    model.eval()
    # The counter does not know the CPU's fused attention; as plain matrix products it is counted
    # everywhere.
    # Not inference mode: the counter hooks parameters that are given to a module as its input.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        # A full mask changes no count, and on the meta device nobody can look whether it is full.
        model(input_ids=ids, attention_mask=None if ids.is_meta else torch.ones_like(ids))
    model.train(training)
    return counter.get_total_flops()


def _product_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """[M, K] x [K, N], from the shapes that the counter hands over."""
    return 2 * a[0] * a[1] * b[1]


def hardware() -> dict[str, Any]:
    """What a measurement depends on, machine and libraries; it names no host, user or path."""
    name, flags = _cpu()
    return {
        "cpu": name,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "instructions": flags,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "onnxruntime")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> tuple[str, list[str]]:
    """The processor's name, and which of the instruction sets that decide speed it has."""
    wanted = {
        "avx2": "AVX2",
        "avx512f": "AVX512",
        "avx512_vnni": "AVX512-VNNI",
        "avx512_bf16": "AVX512-BF16",
        "amx_tile": "AMX",
    }
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine(), []
    lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()]
    fields = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    found = fields.get("flags", "").split()
    return fields.get("model name", platform.machine()), [
        wanted[flag] for flag in wanted if flag in found
    ]


def bench(
    model: Path,
    against: Path | None = None,
    *,
    names: tuple[str, str] = ("model", "against"),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    backend: Backend = "torch",
    threads: int | None = None,
    device: str | None = None,
    repeats: int | None = None,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Measure one model, or two side by side.

    Args:
        model: a model folder, or for ``onnx`` an exported folder or a ``.onnx`` file.
        against: what to compare with; the speed-up is relative to it.
        names: what to call the two in the result.
        shapes, backend, threads, device, repeats, seconds: see ``raybert.latency.latency``.

    Returns:
        ``{"models": {name: {"path", "parameters", "bytes", "flops"}}, "latency": rows, "speedup":
        rows, "hardware"}``; FLOPs are of one row of the first shape's length. Of a ``.onnx`` file
        neither parameters nor FLOPs are known.

    Raises:
        UserError: a folder does not hold a model, or cannot be run.
    """
    paths = {names[0]: Path(model)} | ({names[1]: Path(against)} if against else {})
    if against and names[0] == names[1]:
        raise UserError(f"both models are called {names[0]!r}; give them different names.")
    measured = {name: _measure(path, shapes[0][1]) for name, path in paths.items()}
    rows = latency(
        paths,
        shapes,
        backend=backend,
        threads=threads,
        device=device,
        repeats=repeats,
        seconds=seconds,
    )
    return {
        "models": measured,
        "latency": rows,
        "speedup": speedups(rows, names[1]) if against else [],
        "hardware": hardware(),
    }


def _measure(path: Path, length: int) -> dict[str, Any]:
    inner = path / "model.onnx"
    exported = inner.is_file() and not any(path.glob("*.safetensors"))
    if path.suffix == ".onnx" or exported:
        graph = inner if exported else path
        # Weights beyond 2 GB, or asked for, lie beside the graph.
        files = [file for file in (graph, Path(f"{graph}.data")) if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        counted = {"parameters": None, "flops": None}
        return {"path": str(path), "bytes": {"weights": size, "total": size}, **counted}
    return {"path": str(path), **count(path, length)}


def count(folder: Path, length: int) -> dict[str, Any]:
    """``parameters``, ``bytes`` and ``flops`` (of a row of ``length`` tokens) of a model folder."""
    from raybert.models import load

    size = disk_bytes(folder)
    model = load(folder)
    return {
        "parameters": parameters(model),
        "bytes": size,
        "flops": flops(model, length=length),
    }


def format_bench(result: Mapping[str, Any]) -> str:
    """The result of ``bench`` as Markdown that is also readable as plain text."""
    sizes = [
        [
            escape_markdown(name),
            f"{m['parameters']['total'] / 1e6:.2f}" if m["parameters"] else "n/a",
            f"{m['parameters']['rest'] / 1e6:.2f}" if m["parameters"] else "n/a",
            f"{m['bytes']['weights'] / 1e6:.2f}",
            f"{m['flops'] / 1e9:.3f}" if m["flops"] else "n/a",
        ]
        for name, m in result["models"].items()
    ]
    ratio = {_place(row): f"{row['speedup']:.2f}x" for row in result["speedup"]}
    times = [
        [
            escape_markdown(row["model"]),
            row["backend"],
            f"{row['batch']} x {row['length']}",
            f"{row['p50_ms']:.2f}",
            f"{row['p95_ms']:.2f}",
            f"{row['throughput']:.1f}",
            f"{row['peak_memory_mb']:.0f}",
            str(row["repeats"]),
            ratio.get(_place(row), "1.00x" if ratio else ""),
        ]
        for row in sorted(result["latency"], key=lambda r: (r["backend"], r["batch"], r["length"]))
    ]
    machine = result["hardware"]
    threads = result["latency"][0]["threads"]
    parts = [
        markdown_table(
            ["model", "parameters (M)", "without embeddings (M)", "weights (MB)", "GFLOPs a row"],
            sizes,
        ),
        markdown_table(
            [
                "model",
                "backend",
                "batch x length",
                "p50 (ms)",
                "p95 (ms)",
                "rows/s",
                "peak (MB)",
                "passes",
                "speed-up",
            ],
            times,
        ),
        f"{machine['gpu'] or machine['cpu']} ({', '.join(machine['instructions'])}), "
        f"{threads} threads, torch {machine['torch']}, "
        f"onnxruntime {machine['onnxruntime'] or 'absent'}. MB = 10^6 bytes.",
    ]
    return "\n\n".join(parts) + "\n"


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["backend"], row["batch"], row["length"]
