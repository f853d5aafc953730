"""A Theseus student (half the layers) against its teacher, by the clock.

    python tests/benchmarks/theseus_latency.py

Weights do not change a forward pass's time, so the student is the teacher's first half, which is
where Theseus's successors start from. Each model runs in a process of its own, in turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import Figure, encoder, latencies, options, publish

SHAPES = [(1, 128), (8, 128)]


def save_models(name: str, folder: Path) -> dict[str, Path]:
    """The encoder with a classification head, whole and halved."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    paths = {}
    depth = AutoConfig.from_pretrained(name).num_hidden_layers
    for which, layers in (("teacher", depth), ("student", depth // 2)):
        config = AutoConfig.from_pretrained(name)
        config.num_hidden_layers = layers
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config)
        paths[which] = folder / which
        model.save_pretrained(paths[which])
    return paths


def measure(args: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `raybert.latency.latency` and the student's speed-ups."""
    from raybert.latency import speedups

    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        paths = save_models(encoder(args), Path(folder))
        rows = latencies(args, "torch", paths, SHAPES)
    return rows, speedups(rows, "teacher")


def main() -> None:
    """Measure, print and write."""
    args = options("a Theseus student's speed-up over its teacher", timed=True).parse_args()
    rows, faster = measure(args)
    figures = [
        Figure(
            f"student of half the layers, batch {row['batch']} x {row['length']}, faster by",
            row["speedup"],
            "x",
            1.9,
            at_most=False,
        )
        for row in faster
    ]
    publish(args, "Theseus student against its teacher (PyTorch)", figures, {"latency": rows})


if __name__ == "__main__":
    main()
