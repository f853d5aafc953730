"""What a live teacher costs: a step that distils, a plain one, and a teacher's forward pass alone.

    python tests/benchmarks/distillation_step.py --data glue/MRPC

The teacher has the student's size. All three run on the same batches, in turns, in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import (
    Figure,
    Step,
    Worker,
    alternate,
    blocks_of,
    make_trainer,
    medians,
    options,
    publish,
    recipe_for,
    single_worker,
    waiter,
)

PLAIN, DISTIL, FORWARD = "fine-tuning", "with a live teacher", "teacher's forward pass"


def save_teacher(trainer: Any, folder: Path) -> str:
    """A model with a head for the task: an untrained one costs what a trained one does."""
    model, _ = trainer._build(0)
    model.save_pretrained(folder)
    return str(folder)


def forward_only(trainer: Any, teacher: Any) -> Callable[[Sequence[Step]], None]:
    """The teacher's forward pass as the distilling step runs it."""
    import torch

    from raybert.data import MODEL_INPUTS

    device = trainer.world.device

    def run(block: Sequence[Step]) -> None:
        for (batch,), _ in block:
            with torch.no_grad():
                teacher(**{k: batch[k].to(device) for k in MODEL_INPUTS if k in batch})

    return run


def measure(args: Any) -> dict[str, list[float]]:
    """Milliseconds of the three variants at each step."""
    from raybert.phase import Phase

    steps = 4 if args.quick else args.steps
    with single_worker() as folder:
        plain = make_trainer(recipe_for(args, folder))
        path = save_teacher(plain, folder / "teacher")
        recipe = recipe_for(args, folder, kd={"alpha": 0.5, "temperature": 2.0})
        distilling = make_trainer(recipe, teacher=path)
        teacher = distilling._load_teacher()
        # A difference of two times is small beside a machine's drift: turns of one step each.
        planned = blocks_of(plain, steps, 1)
        total = sum(len(block) for block in planned)
        variants: dict[str, Callable[[Sequence[Step]], Any]] = {
            PLAIN: Worker(plain, Phase(), total),
            DISTIL: Worker(distilling, Phase(), total, teacher),
            # Another copy, all of it: the other's last layer computes what its head reads.
            FORWARD: forward_only(distilling, distilling._load_teacher()),
        }
        return alternate(variants, planned, waiter(plain))


def main() -> None:
    """Measure, print and write."""
    parser = options("a distilling step against plain fine-tuning", data=True)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each variant")
    args = parser.parse_args()
    times = measure(args)
    extra = [
        (distil - plain) / forward
        for distil, plain, forward in zip(times[DISTIL], times[PLAIN], times[FORWARD], strict=True)
    ]
    typical = medians(times)
    publish(
        args,
        "Distillation step with a live teacher of the student's size",
        [
            Figure(
                "cost of distilling, in teacher forward passes", statistics.median(extra), "x", 1.0
            ),
            Figure("distilling step", typical[DISTIL], "ms"),
            Figure("plain step", typical[PLAIN], "ms"),
            Figure("teacher's forward pass", typical[FORWARD], "ms"),
        ],
        {"ms_per_step": typical, "extra_forwards": [round(value, 3) for value in extra]},
    )


if __name__ == "__main__":
    main()
