"""EBERT students that skip against their dense teacher, by the clock and by the count.

    python tests/benchmarks/ebert_latency.py

The gates of a student keep the same share of every block, at random, differently for each sample:
a logit's bias is set so that the share comes out on the very rows that are timed. What a trained
gate keeps is more alike from sample to sample, so batches are at a disadvantage here. Each model
runs in a process of its own, in turns; then the same models' graphs in ONNX Runtime.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Speedup, against_teacher, encoder, latencies, options, publish
from onnx_latency import write

SHAPES = [(1, 128), (1, 64), (8, 128)]

RATIOS = (0.3, 0.5, 0.6, 0.8)
"""Target shares of the layers' FLOPs."""

TARGETS = {(1, 128): 0.85, (1, 64): 0.80}
"""Share of the speed-up by the count that the clock is to show, at a ratio of 0.5."""

LEAST = {(8, 128): 1.2}
"""Speed-up that batches are to have at least, at a ratio of 0.5."""


def aim(model: Any, share: float) -> None:
    """Give gates random logits of which the wanted share is kept on the rows that are timed."""
    import torch

    from raybert.methods.ebert import gated
    from raybert.timer import token_ids

    blocks = [block for _, block in gated(model)]
    batches = [torch.tensor(token_ids(*shape, model.config.vocab_size)) for shape in SHAPES]
    draw = torch.Generator().manual_seed(0)
    for block in blocks:  # in order: what comes before changes what it sees
        gate: Any = block.gate
        seen: list[torch.Tensor] = []
        handle = gate.register_forward_pre_hook(functools.partial(_see, seen))
        with torch.no_grad():
            gate.reduce.weight.normal_(0.0, 1.0, generator=draw)
            gate.score.weight.normal_(0.0, 1.0, generator=draw)
            for ids in batches:
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
            handle.remove()
            first = torch.cat(seen)
            gate.reduce.bias.copy_(-(first @ gate.reduce.weight.t()).mean(0))
            gate.score.bias.zero_()
            logits = gate.logits(first)
            gate.score.bias.fill_(-logits.quantile(1 - share).item())


def _see(seen: list[Any], _module: Any, args: tuple[Any, ...]) -> None:
    seen.append(args[0])


def save_models(args: Any, folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, float]]]:
    """The teacher's folder and the students', and the share of the whole model's multiply-adds that
    each does on the rows of each shape."""
    from transformers import AutoModelForSequenceClassification

    from raybert.bench import flops
    from raybert.compressed import mark_compressed
    from raybert.methods.ebert import EBERT

    def fresh() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(encoder(args)).eval()

    teacher = fresh()
    dense = {shape: flops(teacher, *shape) for shape in SHAPES}
    teacher.save_pretrained(folder / "teacher")
    paths, shares = {"teacher": folder / "teacher"}, {}
    for ratio in RATIOS:
        model, name = fresh(), f"{ratio:.0%}"
        method = EBERT(target_flops_ratio=ratio).resolve(model.config)
        for phase in method.phases():
            phase.prepare(model)
            phase.finish(model)
        aim(model, method.kept)
        mark_compressed(model, method)
        shares[name] = {f"{b}x{t}": round(flops(model, b, t) / dense[b, t], 4) for b, t in SHAPES}
        paths[name] = folder / name.strip("%")
        model.save_pretrained(paths[name])
    return paths, shares


def measure(args: Any) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows of `raybert.latency.latency`, and the students' shares of FLOPs."""
    from raybert import load

    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        paths, shares = save_models(args, Path(folder))
        graphs = {
            name: write(load(str(path)), Path(folder) / f"onnx-{path.name}")
            for name, path in paths.items()
        }
        rows = [
            *latencies(args, "torch", paths, SHAPES),
            *latencies(args, "onnx", graphs, SHAPES),
        ]
    return rows, shares


def aimed(row: Speedup, shares: dict[str, dict[str, float]]) -> Speedup:
    """A speed-up beside the one by the count, and what PyTorch's is to reach."""
    shape = row.batch, row.length
    counted = 1 / shares[row.model][f"{row.batch}x{row.length}"]
    goal = None
    if row.model == "50%" and row.backend == "torch":
        goal = LEAST.get(shape) or round(TARGETS[shape] * counted, 2)
    name = f"ebert, {row.model} of the FLOPs"
    return replace(row, model=name, counted=round(counted, 2), aim=goal)


def main() -> None:
    """Measure, print and write."""
    args = options("EBERT students that skip against their dense teacher", timed=True).parse_args()
    rows, shares = measure(args)
    faster = [aimed(row, shares) for row in against_teacher(rows)]
    details = {"latency": rows, "flops": shares}
    publish(args, "EBERT, random gates", [], details, faster)


if __name__ == "__main__":
    main()
