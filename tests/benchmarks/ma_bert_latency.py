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

from common import Figure, best_form, encoder, latencies, medians_of, options, publish
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


def figures(found: dict[str, Any]) -> list[Figure]:
    """Speed-ups over the teacher's faster form, and of the integers over Q8BERT's."""
    times = medians_of(found["latency"])
    made = []
    for batch, length in SHAPES:
        shape = f"batch {batch} x {length}"
        best = best_form(times, batch)
        rows = {(name, "onnx"): times[name, "onnx", batch] for name in CHAINS}
        rows["ma_bert", "torch"] = times["ma_bert", "torch", batch]
        for (name, backend), spent in rows.items():
            title = f"{name} ({backend}), {shape}, faster than the teacher by"
            made.append(Figure(title, best / spent, "x"))
        for name in CHAINS:
            if name.startswith("ma_bert + q8bert"):
                ratio = rows["q8bert", "onnx"] / rows[name, "onnx"]
                made.append(Figure(f"{name}, {shape}, faster than q8bert by", ratio, "x"))
    return made


def main() -> None:
    """Measure, print and write."""
    title = "MA-BERT students in ONNX Runtime and PyTorch against their teacher"
    args = options(title, timed=True).parse_args()
    found = measure(args)
    publish(args, "MA-BERT students against their teacher", figures(found), found)


if __name__ == "__main__":
    main()
