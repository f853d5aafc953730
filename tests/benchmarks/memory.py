"""Peak resident memory of fine-tuning the encoder, batches of 32 rows of 128 tokens, fp32.

    python tests/benchmarks/memory.py

A fresh process does all that `raybert finetune` does (train, evaluate, save, measure) on generated
rows that fill 128 tokens each, and reads its own peak from the kernel at the end.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Figure, encoder, options, publish

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child")


def write_rows(file: Path, rows: int, words: int) -> None:
    """Rows of more words than 128 tokens hold, with a label."""
    draw = random.Random(0)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for number in range(rows):
            writer.writerow([" ".join(draw.choices(WORDS, k=words)), ("a", "b")[number % 2]])


def finetune(model: str, folder: Path, rows: int, steps: int) -> float:
    """Fine-tune for a few steps; this process's peak in GiB. Run in a process of its own."""
    from raybert.recipe_file import recipe_from
    from raybert.run import finetune
    from raybert.timer import process_peak_mb

    for split in ("train", "dev"):
        write_rows(folder / f"{split}.csv", rows * 2, words=200)
    recipe = recipe_from(
        {
            "model": model,
            "task": "classification",
            "data": {
                "train": str(folder / "train.csv"),
                "dev": str(folder / "dev.csv"),
                "text": "text",
                "label": "label",
                "cache": str(folder / "cache"),
            },
            "train": {"batch_size": rows, "max_steps": steps, "epochs": 99, "precision": "fp32"},
            "out": str(folder / "run"),
        }
    )
    finetune(recipe, tell=lambda text: None)
    return process_peak_mb() * 1e6 / 2**30


def main() -> None:
    """Start the process, and print and write what it measured."""
    parser = options("peak memory of fine-tuning")
    parser.add_argument(
        "--child", nargs=3, metavar=("DIR", "ROWS", "STEPS"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.child:
        folder, rows, steps = args.child
        print(f"peak {finetune(encoder(args), Path(folder), int(rows), int(steps)):.4f}")
        return
    rows, steps = (4, 2) if args.quick else (32, 8)
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        command = [sys.executable, __file__, "--model", encoder(args)]
        child = [*command, "--child", folder, str(rows), str(steps)]
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    peak = float(done.stdout.split("peak")[-1])
    publish(
        args,
        f"Memory of fine-tuning, batches of {rows} x 128, fp32",
        [Figure("peak resident memory of the worker", peak, "GiB", 3.0)],
        {"batch": rows, "length": 128, "steps": steps},
    )


if __name__ == "__main__":
    main()
