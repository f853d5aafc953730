"""Q8BERT students beside post-training dynamic quantisation of their own teachers, in accuracy.

    python tests/benchmarks/post_training.py runs/mrpc-q8bert-1 runs/stsb-q8bert-1 ...

Nothing is trained: the students' scores are those of their runs through ONNX Runtime; the teachers
are exported, quantised by ONNX Runtime's own tool, and scored on the same dev rows.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import Figure, options, publish
from onnx_latency import stock_int8, write


def scored(run: Path, root: Path) -> dict[str, Any]:
    """What a run's student and its teacher, quantised after training, retain."""
    import torch

    from raybert.checkpoint import World
    from raybert.data import prepare
    from raybert.evaluate import predict
    from raybert.metrics import score
    from raybert.models import load, load_tokenizer, model_folder
    from raybert.parity import OnnxModel
    from raybert.recipe_file import load_recipe
    from raybert.results import read_run, retained

    report = read_run(run).report
    recipe = load_recipe(str(run / "recipe.yaml"))
    teacher = model_folder(recipe.teacher or run / "teacher")
    data = prepare(recipe.task, recipe.data, load_tokenizer(str(teacher)))
    place = root / str(len(list(root.iterdir())))
    place.mkdir()
    stock = stock_int8(write(load(teacher), place / "float"), place / "int8")
    world = World(0, 1, torch.device("cpu"))
    model = OnnxModel(stock / "model.onnx")
    index, outputs = predict(model, data, "dev", world, recipe.train.eval_batch_size)
    after = score(data.task, data, "dev", index, outputs)[report.metric]
    assert report.teacher is not None
    metrics = report.onnx.metrics if report.onnx else None
    student = metrics[report.metric] if metrics else report.student.score
    goal = report.teacher.score
    last = recipe.method[-1]
    return {
        "bits": [getattr(last, "weight_bits", None), getattr(last, "activation_bits", None)],
        "task": report.task,
        "metric": report.metric,
        "seed": report.seed,
        "teacher": goal,
        "q8bert": student,
        "post_training": after,
        "retained": retained(student, goal, report.floor),
        "post_training_retained": retained(after, goal, report.floor),
    }


def main() -> None:
    """Score, print and write."""
    parser = options("8-bit students beside post-training quantisation", model=False)
    parser.add_argument("runs", nargs="+", type=Path, help="finished q8bert runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        rows = [scored(run, Path(folder)) for run in args.runs]
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    figures = []
    for task, found in by_task.items():
        seeds = f"{len(found)} seeds" if len(found) > 1 else "1 seed"
        weights, activations = found[0]["bits"]
        for key, what, limit in (
            ("retained", f"q8bert, {weights}-bit weights, {activations}-bit activations", 98.0),
            ("post_training_retained", "ONNX Runtime's dynamic quantisation", None),
        ):
            mean = 100 * statistics.mean(row[key] for row in found)
            name = f"{what}, {task}: retained (mean of {seeds})"
            figures.append(Figure(name, mean, "%", limit, at_most=False))
    title = "Quantisation-aware training beside post-training quantisation"
    publish(args, title, figures, {"runs": rows})


if __name__ == "__main__":
    main()
