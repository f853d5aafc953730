"""Tokens that an epoch computes on, padding included: bucketed by length, and padded to 128.

python tests/benchmarks/tokens.py --data glue/MRPC
"""

from __future__ import annotations

import statistics
from typing import Any

from common import Figure, make_trainer, options, publish, recipe_for, single_worker

LENGTH = 128


def tokens(batcher: Any, steps: list[list[list[Any]]]) -> int:
    """Tokens of all batches of an epoch, as their tensors are built."""
    return sum(
        batcher(rows)["input_ids"].numel() for step in steps for turn in step for rows in turn
    )


def measure(args: Any) -> dict[str, Any]:
    """Tokens of an epoch: real ones, bucketed, in batches of any rows, and padded to 128."""
    import numpy as np

    from raybert.data import train_steps

    epochs = 1 if args.quick else 5
    with single_worker() as folder:
        trainer = make_trainer(recipe_for(args, folder, train={"batch_size": 32}))
    lengths, size = trainer.lengths, trainer.recipe.train.batch_size
    batcher = trainer.data.batcher("train")
    shares = {"accumulation": 1, "world_size": 1, "seed": trainer.recipe.train.seed}
    bucketed = [
        tokens(batcher, train_steps(lengths, batch_size=size, epoch=epoch, **shares))
        for epoch in range(epochs)
    ]
    order = np.random.default_rng(0).permutation(len(lengths))
    anyhow = [[[order[at : at + size]]] for at in range(0, len(order), size)]
    return {
        "rows": len(lengths),
        "batch_size": size,
        "epochs": epochs,
        "real": int(lengths.sum()),
        "bucketed": round(statistics.median(bucketed)),
        "padded_to_the_longest_of_32_random_rows": tokens(batcher, anyhow),
        "padded_to_128": len(lengths) * LENGTH,
    }


def main() -> None:
    """Count, print and write."""
    args = options("tokens an epoch, bucketed against padded", data=True).parse_args()
    counted = measure(args)
    share = 100 * counted["bucketed"] / counted["padded_to_128"]
    rows = "MRPC" if args.data else "the demo task"
    publish(
        args,
        f"Tokens of an epoch of {rows}, batches of {counted['batch_size']}",
        [
            Figure("tokens an epoch, bucketed, of those padded to 128", share, "%", 60.0),
            Figure("tokens an epoch, bucketed", counted["bucketed"] / 1e3, "k"),
        ],
        counted,
    )


if __name__ == "__main__":
    main()
