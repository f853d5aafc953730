"""LoBERT's released grid of 24 (rate, weight of the [CLS] vectors, normalisation) on the demo task:
run to the end with a live teacher, as released, and with ASHA and saved predictions.

    python tests/benchmarks/tune_grid.py

Both go through the same 24 trials in the same order, as many at once, on the same machine, with the
same rows, steps and evaluations; the teacher is there before the clocks start, the saved
predictions are not. The grid's time is that of all its trials: only at its end is its best known.
The other's is taken when its first finished trial has a dev score as good, and at its end. Sizes
are chosen for a quarter of an hour: shorter trials than the released four epochs of whole tasks.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import Figure, encoder, options, publish


def search(
    args: Any, folder: Path, teacher: Path, scheduler: str, predictions: str
) -> dict[str, Any]:
    """One way to go through the grid: its seconds, and when which score was reached."""
    from raybert.recipe_file import recipe_from
    from raybert.search import run_search
    from raybert.search_plan import Settings, make_search

    name = f"{scheduler}-{predictions}"
    # Predictions of its own: what another search has saved would be a present.
    data = {"max_length": 64, "limit": args.rows, "cache": str(folder / f"cache-{name}")}
    train = {"epochs": args.epochs, "batch_size": 32, "precision": "fp32", "eval_every": args.every}
    recipe = recipe_from(
        {
            "task": "demo",
            "data": data,
            "teacher": str(teacher),
            "method": ["lobert"],
            "kd": {"alpha": 0.5, "temperature": 10.0, "predictions": predictions},
            "train": train,
            "measure": {"batches": []},
            "out": str(folder / name),
        }
    )
    settings = Settings(
        trials=args.trials,
        algorithm="grid",
        scheduler=scheduler,
        objectives="score",
        finalists=0,
        concurrent=args.concurrent,
    )
    began, clock = time.time(), time.perf_counter()
    answer = run_search(make_search(recipe, "lobert:PAPER", settings), tell=print)
    seconds = time.perf_counter() - clock
    ledger = answer.folder / "ledger"
    reached = sorted(
        (round((ledger / f"{entry.trial.name}.json").stat().st_mtime - began, 1), entry.score.mean)
        for entry in answer.finished
    )
    states = [trial.state for trial in answer.trials]
    return {
        "seconds": round(seconds, 1),
        "score": answer.winner.score.mean,
        "winner": answer.winner.trial.values,
        "stopped": states.count("stopped"),
        "finished": states.count("finished"),
        "reached": reached,
    }


def main() -> None:
    """Search both ways, print and write."""
    parser = options("ASHA and saved predictions against LoBERT's released grid")
    parser.add_argument("--rows", type=int, default=512, help="training rows (default: 512)")
    parser.add_argument("--epochs", type=float, default=4.0, help="of each trial (default: 4)")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at once (default: 2)")
    args = parser.parse_args()
    args.trials = 24
    if args.quick:
        args.rows, args.every, args.trials = 64, 2, 3
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
        grid = search(args, folder, teacher, "none", "live")
        asha = search(args, folder, teacher, "asha", "saved")
    # Never: what the whole took, and the points below the grid's best say so.
    reached = next((at for at, score in asha["reached"] if score >= grid["score"]), asha["seconds"])
    points = 100 * (asha["score"] - grid["score"])
    figures = [
        Figure("ASHA and saved predictions: time to the grid's best score, by the grid's time",
               reached / grid["seconds"], "x", 1 / 3),
        Figure("the same, best dev score less the grid's", points, "points", 0.0, at_most=False),
        Figure("the same, time to its end, by the grid's time",
               asha["seconds"] / grid["seconds"], "x"),
        Figure("the whole grid", grid["seconds"], "s"),
    ]  # fmt: skip
    details = {"grid": grid, "asha": asha, "rows": args.rows, "epochs": args.epochs}
    details |= {"concurrent": args.concurrent, "eval_every": args.every}
    publish(
        args, f"LoBERT's released grid ({args.trials} trials) on the demo task", figures, details
    )


if __name__ == "__main__":
    main()
