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

from common import Figure, encoder, options, publish

SHAPES = [(1, 128), (8, 128)]


def save_models(name: str, folder: Path) -> dict[str, Path]:
    """The encoder with a classification head, in float32 and in 8 bits, static and dynamic."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from raybert.methods import METHODS
    from raybert.models import mark_compressed
    from raybert.timer import token_ids

    paths = {}
    for which, mode in (("teacher", None), ("student", "ema"), ("student_dynamic", "dynamic")):
        model: Any = AutoModelForSequenceClassification.from_pretrained(name).eval()
        if mode:
            chosen = METHODS["q8bert"].model_validate({"mode": mode}).resolve(model.config)
            (phase,) = chosen.phases()
            ids = torch.tensor(token_ids(8, 128, model.config.vocab_size))
            phase.initialise(model, [{"input_ids": ids}])
            phase.prepare(model)
            phase.finish(model)
            mark_compressed(model, chosen)
        paths[which] = folder / which
        model.save_pretrained(paths[which])
    return paths


def measure(args: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Details, and the students' speed-ups."""
    from raybert.bench import count
    from raybert.int8 import backend
    from raybert.latency import latency, speedups

    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        paths = save_models(encoder(args), Path(folder))
        sizes = {name: count(path, 128) for name, path in paths.items()}
        seconds = 0.2 if args.quick else 15.0
        rows = latency(paths, SHAPES, backend="torch", seconds=seconds)
    return {"product": backend(), "sizes": sizes, "latency": rows}, speedups(rows, "teacher")


def main() -> None:
    """Measure, print and write."""
    args = options("8-bit students' size and speed-up over their teacher").parse_args()
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
