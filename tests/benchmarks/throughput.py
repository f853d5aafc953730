"""Tokens a second at 1, 2 and 4 workers of one thread each, and the efficiency of more workers.

    python tests/benchmarks/throughput.py

Every worker number takes the same optimiser steps on the same rows. The cluster is of this machine:
workers beyond its cores share them, so what they add is what it costs to synchronise.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, options, publish
from soak import cluster, tiny_model

WORKERS = (1, 2, 4)
LOGGED = 10
"""Steps between two lines of metrics.jsonl; those up to the second are not counted."""


def words_of(folder: Path, workers: int, steps: int, out: Path) -> list[str]:
    """The recipe of a run that does nothing but train."""
    words = [f"model={folder}/model", "task=classification", "data.text=text", "data.label=label"]
    words += [f"data.train={folder}/train.csv", f"data.dev={folder}/dev.csv"]
    words += ["train.batch_size=64", f"train.max_steps={steps}", f"train.eval_every={steps}"]
    words += [f"train.save_every={steps}", f"train.epochs={steps}", "train.zero=0"]
    words += ["measure.batches=[]", "resources.cpus=1", f"workers={workers}", f"out={out}"]
    return words


def pace(run: Path) -> float:
    """Tokens a second between the second logged line and the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"][1:]
    first, last = train[0], train[-1]
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


def measure(args: Any, folder: Path) -> dict[int, list[float]]:
    """Tokens a second of each worker number, in alternating runs."""
    tiny_model(folder)
    steps = 4 * LOGGED if args.quick else args.steps
    found: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    with cluster(folder, max(WORKERS)) as (_, env):
        env["OMP_NUM_THREADS"] = "1"
        for turn in range(1 if args.quick else args.turns):
            for workers, paces in found.items():
                run = folder / f"run-{workers}-{turn}"
                words = words_of(folder, workers, steps, run)
                command = [sys.executable, "-m", "raybert", "finetune", *words]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
                paces.append(pace(run))
                print(f"{workers} worker(s): {paces[-1]:.0f} tokens/s", flush=True)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = options("tokens a second at 1, 2 and 4 workers", model=False)
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--turns", type=int, default=3, help="runs of each number (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rb", ignore_cleanup_errors=True) as folder:
        found = measure(args, Path(folder))
    medians = {workers: sorted(paces)[len(paces) // 2] for workers, paces in found.items()}
    figures = []
    for workers, tokens in medians.items():
        what = f"{workers} worker{'s' if workers > 1 else ''}"
        figures.append(Figure(what, tokens, "tokens/s"))
        if workers > 1:
            share = 100 * tokens / (workers * medians[1])
            figures.append(Figure(f"{what}, of {workers} times one's", share, "%"))
    publish(args, "Throughput of a tiny model", figures, {"tokens_a_second": found})


if __name__ == "__main__":
    main()
