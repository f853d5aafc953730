"""What distilling from saved predictions costs: such a step against a plain fine-tuning step.

    python tests/benchmarks/cached_step.py --data glue/MRPC

The teacher has the student's size; its logits and [CLS] states are saved before anything is timed.
Both run on the same batches, in turns, in one process.
"""

from __future__ import annotations

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
    ratio,
    recipe_for,
    single_worker,
    waiter,
)

PLAIN, SAVED = "fine-tuning", "from saved predictions"


def save_predictions(trainer: Any, folder: Path) -> tuple[str, Path]:
    """An untrained model with a head for the task, and what it says of every training row."""
    from raybert.teacher import Predictor, request_for, seal

    model, _ = trainer._build(0)
    model.save_pretrained(folder)
    request = request_for(
        str(folder),
        trainer.data,
        "train",
        cls=True,
        batch_size=trainer.recipe.train.eval_batch_size,
        cache=trainer.recipe.data.cache_folder,
    )
    predictor = Predictor(request, trainer.world.device)
    seal(request, {shard: predictor.write(shard) for shard in range(request.shards)})
    return str(folder), request.folder


def measure(args: Any) -> dict[str, list[float]]:
    """Milliseconds per step of the two variants in each block."""
    from raybert.phase import Phase

    blocks, size = (2, 2) if args.quick else (args.blocks, 5)
    with single_worker() as folder:
        plain = make_trainer(recipe_for(args, folder))
        teacher, predictions = save_predictions(plain, folder / "teacher")
        recipe = recipe_for(args, folder, kd={"alpha": 0.5, "temperature": 2.0, "cls": 10.0})
        distilling = make_trainer(recipe, teacher, predictions)
        planned = blocks_of(plain, blocks, size)
        total = sum(len(block) for block in planned)
        variants: dict[str, Callable[[Sequence[Step]], Any]] = {
            PLAIN: Worker(plain, Phase(), total),
            SAVED: Worker(distilling, Phase(), total, distilling._load_teacher()),
        }
        return alternate(variants, planned, waiter(plain))


def main() -> None:
    """Measure, print and write."""
    parser = options("a step that distils from saved predictions against a plain one", data=True)
    parser.add_argument("--blocks", type=int, default=12, help="timed blocks of 5 steps")
    args = parser.parse_args()
    times = measure(args)
    typical = medians(times)
    publish(
        args,
        "Distillation step from saved predictions (logits and every layer's [CLS] state)",
        [
            Figure(
                "step from saved predictions by a plain step", ratio(times, SAVED, PLAIN), "x", 1.1
            ),
            Figure("step from saved predictions", typical[SAVED], "ms"),
            Figure("plain step", typical[PLAIN], "ms"),
        ],
        {"ms_per_step": typical},
    )


if __name__ == "__main__":
    main()
