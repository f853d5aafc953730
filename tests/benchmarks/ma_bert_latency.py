"""MA-BERT students against their teacher in its best stock form, by the clock.

    python tests/benchmarks/ma_bert_latency.py

The teacher's best stock form is ONNX Runtime on the float32 graph that raybert exports, or PyTorch
with fused attention, whichever is faster at a shape. A forward pass takes as long whatever the
weights are, so students are the encoder after surgery, without training. With Q8BERT after it,
MA-BERT is also put against Q8BERT alone: that is what arithmetic without other functions is for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import Figure, Speedup, against_teacher, encoder, latencies, options, publish
from onnx_latency import SHAPES, compressed, write

MATRIX = {"name": "ma_bert", "length": 128, "warm_start": False}
INTEGER = {"name": "q8bert"}

CHAINS: dict[str, list[dict[str, Any]]] = {
    "ma_bert": [MATRIX],
    "ma_bert, one net": [{**MATRIX, "shared": True}],
    "q8bert": [INTEGER],
    "ma_bert + q8bert": [MATRIX, INTEGER],
    "ma_bert + q8bert, integers only": [MATRIX, {**INTEGER, "integer_only": True}],
}


def measure(args: Any) -> dict[str, Any]:
    """Latency rows of all graphs, and of teacher and student in PyTorch."""
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        root = Path(folder)
        graphs, models = {}, {}
        chains = {"teacher": [], **CHAINS}
        for number, (label, chain) in enumerate(chains.items()):
            model = compressed(encoder(args), chain)
            graphs[label] = write(model, root / f"onnx{number}")
            if label in ("teacher", "ma_bert"):
                models[label] = root / f"torch{number}"
                model.save_pretrained(models[label])
        rows = latencies(args, "onnx", graphs, SHAPES)
        rows += latencies(args, "torch", models, SHAPES)
    return {"latency": rows}


def figures(faster: list[Speedup]) -> list[Figure]:
    """How much faster than Q8BERT's alone MA-BERT's integers are."""
    times = {(one.model, one.batch): one.speedup for one in faster if one.backend == "onnx"}
    return [
        Figure(f"{name}, batch {batch}, faster than q8bert by", found / times["q8bert", batch], "x")
        for (name, batch), found in times.items()
        if name.startswith("ma_bert + q8bert")
    ]


def main() -> None:
    """Measure, print and write."""
    title = "MA-BERT students in ONNX Runtime and PyTorch against their teacher"
    args = options(title, timed=True).parse_args()
    found = measure(args)
    faster = against_teacher(found["latency"], best_form=True)
    publish(args, "MA-BERT", figures(faster), found, faster)


if __name__ == "__main__":
    main()
