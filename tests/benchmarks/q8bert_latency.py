"""A Q8BERT student in PyTorch against its teacher: bytes, and time by the clock.

    python tests/benchmarks/q8bert_latency.py

What was learned does not change a forward pass's time, so the student is the teacher with ranges
from random token ids. Each model runs in a process of its own, in turns. Through ONNX Runtime the
same student is timed by `onnx_latency.py`. Without VNNI a product of integers is no faster than
float32's, and PyTorch runs that instead.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Figure, against_teacher, encoder, latencies, options, publish
from onnx_latency import SHAPES, compressed


def save_models(name: str, folder: Path) -> dict[str, Path]:
    """The encoder with a classification head, in float32 and in 8 bits, static and dynamic."""
    paths = {}
    for which, mode in (("teacher", None), ("q8bert", "ema"), ("q8bert, dynamic", "dynamic")):
        paths[which] = folder / which
        chain = [{"name": "q8bert", "mode": mode}] if mode else []
        compressed(name, chain).save_pretrained(paths[which])
    return paths


def main() -> None:
    """Measure, print and write."""
    from raybert.bench import count
    from raybert.int8 import backend

    args = options("8-bit students' size and speed-up over their teacher", timed=True).parse_args()
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        paths = save_models(encoder(args), Path(folder))
        sizes = {name: count(path, 128) for name, path in paths.items()}
        rows = latencies(args, "torch", paths, SHAPES)
    whole, small = (sizes[name]["bytes"]["weights"] for name in ("teacher", "q8bert"))
    figures = [
        Figure("q8bert: weights on disk, smaller by", whole / small, "x", 3.5, at_most=False)
    ]
    details = {"product": backend(), "sizes": sizes, "latency": rows}
    publish(args, "Q8BERT, 8 bits", figures, details, against_teacher(rows))


if __name__ == "__main__":
    main()
