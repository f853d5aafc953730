"""What a search costs beside training: eight trials of one worker each, short and less short.

    python tests/benchmarks/tune_overhead.py [--task mrpc --data glue/MRPC --epochs 1]

The teacher is there before the clock starts; what counts is everything from the start of `tune` to
its answer: the teacher's predictions, starting Ray, importing torch, planning, loading, evaluating,
saving and measuring models, drawing the page; and that places for trials stay empty while the last
ones run, which is told beside it. With ``--concurrent 1`` there are none such.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from common import Figure, encoder, options, publish


def measure(args: Any, folder: Path, epochs: float) -> dict[str, Any]:
    """Seconds of a search, and those of its trials' optimiser steps."""
    from ray import tune as ray_tune

    from raybert.finalists import read_finished
    from raybert.ledger import Ledger
    from raybert.recipe_file import recipe_from
    from raybert.run import finetune
    from raybert.search import run_search
    from raybert.search_plan import Settings, make_search

    data = {
        "source": args.data,
        "max_length": 64,
        "limit": 64 if args.quick else None,
        "cache": str(folder / "cache"),
    }
    keys: dict[str, Any] = {"task": args.task, "data": data, "model": encoder(args)}
    training = {"epochs": 1, "lr": 1e-4, "batch_size": 32, "precision": "fp32"}
    teacher = finetune(
        recipe_from({**keys, "train": training, "out": str(folder / "teacher")}), tell=print
    )
    keys.pop("model")
    recipe = recipe_from(
        {
            **keys,
            "teacher": str(teacher),
            "method": ["lobert"],
            "kd": {"alpha": 0.5},
            "train": {**training, "epochs": epochs},
            "measure": {"batches": []},
            "out": str(folder / "search"),
        }
    )
    space = {
        "method.lobert.share": ray_tune.uniform(0.3, 0.7),
        "train.lr": ray_tune.loguniform(5e-5, 2e-4),
    }
    trials = 2 if args.quick else 8
    settings = Settings(trials=trials, finalists=0, algorithm="random", concurrent=args.concurrent)
    began = time.perf_counter()
    run_search(make_search(recipe, space, settings), tell=print)
    seconds = time.perf_counter() - began
    finished = read_finished(Ledger(folder / "search"), folder / "search")
    steps = [entry.reports[0].training.seconds for entry in finished]
    places = min(args.concurrent, trials)
    outside = 1 - sum(steps) / (seconds * places)
    created = [entry.reports[0].created.replace("Z", "+00:00") for entry in finished]
    last = sorted(map(datetime.fromisoformat, created))[-places:]
    empty = sum((last[-1] - end).total_seconds() for end in last) / (seconds * places)
    return {
        "epochs": epochs,
        "trials": trials,
        "seconds": round(seconds, 2),
        "steps": [round(s, 2) for s in steps],
        "outside": round(100 * outside, 2),
        "empty": round(100 * empty, 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = options("what a search costs beside training")
    parser.add_argument(
        "--epochs", type=float, nargs="+", default=[1.0, 4.0], help="of each trial (default: 1 4)"
    )
    parser.add_argument("--task", default="demo", help="what trials train on (default: demo)")
    parser.add_argument("--data", help="the task's files")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at once (default: 2)")
    args = parser.parse_args()
    searches = []
    for epochs in args.epochs:
        with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
            searches.append(measure(args, Path(folder), epochs))
    trials = searches[0]["trials"]
    side_by_side = min(args.concurrent, trials)
    figures = []
    for number, found in enumerate(searches):
        long = statistics.median(found["steps"])
        what = (
            f"trials of {found['epochs']:g} epoch(s), {long:.0f} s of steps each, "
            f"{side_by_side} at once"
        )
        limit = 15.0 if number == 0 else None
        figures += [
            Figure(f"{what}: time outside training steps", found["outside"], "%", limit),
            Figure(f"{what}: of it, places empty at the end", found["empty"], "%"),
            Figure(f"{what}: the whole search", found["seconds"], "s"),
        ]
    title = f"A search of {trials} trials, {side_by_side} at once"
    details = {"searches": searches, "concurrent": side_by_side}
    publish(args, title, figures, details, variant=f"_{side_by_side}")


if __name__ == "__main__":
    main()
