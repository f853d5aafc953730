"""LoBERT students at half of the encoder's parameters against their dense teacher, by the clock.

    python tests/benchmarks/lobert_latency.py

Weights do not change a forward pass's time, so factors are left at zero. Each model runs in a
process of its own, in turns. FALCON modes have no ranks to choose, so the feed-forward's make up
for them; every attention mode stands beside ffn_svd, and self_svd beside ffn_tucker.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import against_teacher, encoder, latencies, options, publish

SHAPES = [(1, 128), (8, 128)]

CASES: dict[str, dict[str, Any]] = {
    "self_svd + ffn_svd": {},
    "self_svd with output + ffn_svd": {"attention_output": True},
    "self_tucker_layer + ffn_svd": {"attention": "self_tucker_layer"},
    "self_falcon_layer + ffn_svd": {"attention": "self_falcon_layer"},
    "self_tucker_vertical + ffn_svd": {"attention": "self_tucker_vertical"},
    "self_falcon_vertical + ffn_svd": {"attention": "self_falcon_vertical"},
    "self_tucker_4d + ffn_svd": {"attention": "self_tucker_4d"},
    "self_falcon_4d + ffn_svd": {"attention": "self_falcon_4d"},
    "self_svd + ffn_tucker": {"ffn": "ffn_tucker"},
}


def save_models(args: Any, folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """The teacher's folder and the students', and the share of multiply-adds that each does."""
    from transformers import AutoModelForSequenceClassification

    from raybert.bench import flops
    from raybert.compressed import mark_compressed
    from raybert.methods.lobert import LoBERT

    def fresh() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(encoder(args)).eval()

    teacher = fresh()
    dense = flops(teacher)
    teacher.save_pretrained(folder / "teacher")
    paths, shares = {"teacher": folder / "teacher"}, {}
    for number, (name, keys) in enumerate(CASES.items()):
        if args.only and args.only not in name:
            continue
        model = fresh()
        method = LoBERT.model_validate({"share": 0.5, **keys}).resolve(model.config)
        for phase in method.phases():
            phase.prepare(model)
        mark_compressed(model, method)
        shares[name] = round(flops(model) / dense, 3)
        paths[name] = folder / str(number)
        model.save_pretrained(paths[name])
    return paths, shares


def main() -> None:
    """Measure, print and write."""
    parser = options(
        "LoBERT students at half the encoder's parameters against their teacher", timed=True
    )
    parser.add_argument("--only", help="students whose name holds this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        paths, shares = save_models(args, Path(folder))
        rows = latencies(args, "torch", paths, SHAPES)
    faster = against_teacher(rows, {("self_svd + ffn_svd", *shape): 1.6 for shape in SHAPES})
    faster = [replace(one, counted=round(1 / shares[one.model], 2)) for one in faster]
    details = {"latency": rows, "flops": shares}
    publish(args, "LoBERT at half of the encoder's parameters", [], details, faster)


if __name__ == "__main__":
    main()
