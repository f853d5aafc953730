"""A Theseus student (half the layers) against its teacher, by the clock.

    python tests/benchmarks/theseus_latency.py

Weights do not change a forward pass's time, so the student is the teacher's first half, which is
where Theseus's successors start from. Each model runs in a process of its own, in turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import against_teacher, encoder, latencies, options, publish

SHAPES = [(1, 128), (8, 128)]


def save_models(name: str, folder: Path) -> dict[str, Path]:
    """The encoder with a classification head, whole and halved."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    paths = {}
    depth = AutoConfig.from_pretrained(name).num_hidden_layers
    for which, layers in (("teacher", depth), ("theseus", depth // 2)):
        config = AutoConfig.from_pretrained(name)
        config.num_hidden_layers = layers
        model = AutoModelForSequenceClassification.from_pretrained(name, config=config)
        paths[which] = folder / which
        model.save_pretrained(paths[which])
    return paths


def main() -> None:
    """Measure, print and write."""
    args = options("a Theseus student's speed-up over its teacher", timed=True).parse_args()
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        rows = latencies(args, "torch", save_models(encoder(args), Path(folder)), SHAPES)
    faster = against_teacher(rows, {("theseus", *shape): 1.9 for shape in SHAPES})
    publish(args, "Theseus, half of the layers", [], {"latency": rows}, faster)


if __name__ == "__main__":
    main()
