"""LoBERT's released grid of 24 (rate, weight of the [CLS] vectors, normalisation) on the demo task:
run to the end with a live teacher, as released, and with ASHA and saved predictions.

    python tests/benchmarks/tune_grid.py

Both run the same trials, as many at once, on the same machine; the teacher is there before the
clocks start, the saved predictions are not.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import Figure, encoder, options, publish


def search(args: Any, folder: Path, teacher: Path, name: str, **how: Any) -> dict[str, Any]:
    """One way to go through the grid: its seconds and the best score."""
    from raybert.recipe_file import recipe_from
    from raybert.search import run_search
    from raybert.search_plan import Settings, make_search

    # Predictions of its own: what another search has saved would be a present.
    data = {"max_length": 64, "limit": args.rows, "cache": str(folder / f"cache-{name}")}
    recipe = recipe_from(
        {
            "task": "demo",
            "data": data,
            "teacher": str(teacher),
            "method": ["lobert"],
            "kd": {"alpha": 0.5, "temperature": 10.0, "predictions": how["predictions"]},
            "train": {
                "epochs": args.epochs,
                "batch_size": 32,
                "precision": "fp32",
                "eval_every": args.every,
            },
            "measure": {"batches": []},
            "out": str(folder / name),
        }
    )
    settings = Settings(
        trials=args.trials,
        algorithm="grid",
        scheduler=how["scheduler"],
        objectives="score",
        finalists=0,
        concurrent=args.concurrent,
    )
    began = time.perf_counter()
    answer = run_search(make_search(recipe, "lobert:PAPER", settings), tell=print)
    seconds = time.perf_counter() - began
    states = [trial.state for trial in answer.trials]
    return {
        "seconds": round(seconds, 1),
        "score": answer.winner.reports[0].student.score,
        "winner": answer.winner.trial.values,
        "stopped": states.count("stopped"),
        "finished": states.count("finished"),
    }


def main() -> None:
    """Search both ways, print and write."""
    parser = options("ASHA and saved predictions against LoBERT's released grid")
    parser.add_argument("--rows", type=int, default=1024, help="training rows (default: 1024)")
    parser.add_argument("--epochs", type=float, default=4.0, help="of each trial (default: 4)")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at once (default: 2)")
    args = parser.parse_args()
    args.trials = 24
    if args.quick:
        args.rows, args.epochs, args.every, args.trials = 64, 4.0, 2, 3
    from raybert.recipe_file import recipe_from
    from raybert.run import finetune

    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as name:
        folder = Path(name)
        made = {"epochs": 0.1 if args.quick else 2, "lr": 1e-4, "precision": "fp32"}
        keys = {"task": "demo", "data": {"max_length": 64, "cache": str(folder / "cache")}}
        recipe = recipe_from(
            {**keys, "model": encoder(args), "train": made, "out": str(folder / "teacher")}
        )
        teacher = finetune(recipe, tell=print)
        grid = search(args, folder, teacher, "grid", scheduler="none", predictions="live")
        asha = search(args, folder, teacher, "asha", scheduler="asha", predictions="saved")
    points = 100 * (asha["score"] - grid["score"])
    figures = [
        Figure("time, ASHA and saved predictions by the grid", asha["seconds"] / grid["seconds"],
               "x", 1 / 3),
        Figure("best dev score, likewise less the grid's", points, "points", 0.0, at_most=False),
    ]  # fmt: skip
    details = {"grid": grid, "asha": asha, "rows": args.rows, "epochs": args.epochs}
    publish(
        args, f"LoBERT's released grid ({args.trials} trials) on the demo task", figures, details
    )


if __name__ == "__main__":
    main()
