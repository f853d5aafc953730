"""A Q8BERT student in PyTorch against its teacher: bytes, and time by the clock.

    python tests/benchmarks/q8bert_latency.py

What was learned does not change a forward pass's time, so the student is the teacher with ranges
from random token ids. Each model runs in a process of its own, in turns. Through ONNX Runtime the
same student is timed by `onnx_latency.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import Figure, encoder, latencies, options, publish
from onnx_latency import SHAPES, compressed


def save_models(name: str, folder: Path) -> dict[str, Path]:
    """The encoder with a classification head, in float32 and in 8 bits, static and dynamic."""
    paths = {}
    for which, mode in (("teacher", None), ("student", "ema"), ("student_dynamic", "dynamic")):
        paths[which] = folder / which
        chain = [{"name": "q8bert", "mode": mode}] if mode else []
        compressed(name, chain).save_pretrained(paths[which])
    return paths


def measure(args: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Details, and the students' speed-ups."""
    from raybert.bench import count
    from raybert.int8 import backend
    from raybert.latency import speedups

    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        paths = save_models(encoder(args), Path(folder))
        sizes = {name: count(path, 128) for name, path in paths.items()}
        rows = latencies(args, "torch", paths, SHAPES)
    return {"product": backend(), "sizes": sizes, "latency": rows}, speedups(rows, "teacher")


def main() -> None:
    """Measure, print and write."""
    args = options("8-bit students' size and speed-up over their teacher", timed=True).parse_args()
    details, faster = measure(args)
    sizes = details["sizes"]
    whole, small = (sizes[name]["bytes"]["weights"] for name in ("teacher", "student"))
    figures = [Figure("weights on disk, smaller by", whole / small, "x", 3.5, at_most=False)]
    # Without VNNI a product of integers is no faster than float32's, and PyTorch runs that instead.
    figures += [
        Figure(
            f"{row['model']}, batch {row['batch']} x {row['length']}, "
            f"product {details['product']}, faster by",
            row["speedup"],
            "x",
        )
        for row in faster
    ]
    publish(args, "Q8BERT students against their teacher (PyTorch)", figures, details)


if __name__ == "__main__":
    main()
