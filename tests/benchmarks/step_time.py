"""One worker's step by the clock, against bare PyTorch loops on the same model and batches.

    python tests/benchmarks/step_time.py --data glue/MRPC

Float32 throughout, batches of 32 rows bucketed by length. The bare loops do what a step needs and
nothing else: forward, backward, clipping, AdamW. Blocks of five steps go round the variants in one
process; ratios are medians over blocks of times on the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

OURS, BARE = "raybert", "SDPA, default AdamW"
BEST = ("SDPA, fused AdamW", "eager, fused AdamW")
"""The two best bare loops; which of them wins depends on the rows' lengths."""


def bare_loop(trainer: Any, attention: str, **adamw: Any) -> Callable[[Sequence[Step]], None]:
    """The shortest loop that trains the same model; ``adamw`` are the optimiser's options."""
    import torch

    from raybert.data import MODEL_INPUTS
    from raybert.models import load_for_task

    train, device = trainer.recipe.train, trainer.world.device
    model, _ = load_for_task(
        trainer.job.start, trainer.data.task, seed=train.seed, attention=attention
    )
    model = model.to(device).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=0.01, **adamw)

    def run(block: Sequence[Step]) -> None:
        for (batch,), _ in block:
            inputs = {k: batch[k].to(device) for k in MODEL_INPUTS if k in batch}
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, train.clip)
            optimizer.step()
            optimizer.zero_grad()

    return run


def measure(args: Any) -> tuple[dict[str, list[float]], float]:
    """Milliseconds per step of each variant in each block; and raybert's share of waiting."""
    from raybert.phase import Phase

    blocks, size = (2, 2) if args.quick else (args.blocks, 5)
    with single_worker() as folder:
        trainer = make_trainer(recipe_for(args, folder))
        planned = blocks_of(trainer, blocks, size)
        worker = Worker(trainer, Phase(), total=sum(len(block) for block in planned))
        variants: dict[str, Callable[[Sequence[Step]], Any]] = {
            OURS: worker,
            BARE: bare_loop(trainer, "sdpa"),
            BEST[0]: bare_loop(trainer, "sdpa", fused=True),
            BEST[1]: bare_loop(trainer, "eager", fused=True),
        }
        times = alternate(variants, planned, waiter(trainer))
        return times, worker.waited / worker.seconds


def main() -> None:
    """Measure, print and write."""
    parser = options("raybert's training step against bare PyTorch loops", data=True)
    parser.add_argument("--blocks", type=int, default=12, help="timed blocks of 5 steps")
    args = parser.parse_args()
    times, waiting = measure(args)
    typical = medians(times)
    best = min(BEST, key=lambda name: typical[name])
    rows = "MRPC" if args.data else "the demo task"
    publish(
        args,
        f"Training step on {rows}, fp32, one worker",
        [
            Figure(
                "step against a bare loop (SDPA, default AdamW)",
                ratio(times, OURS, BARE),
                "x",
                0.90,
            ),
            Figure(
                f"step against the best bare loop ({best})", ratio(times, OURS, best), "x", 1.05
            ),
            Figure("share of a step spent waiting for data", 100 * waiting, "%", 2.0),
            Figure("raybert's step", typical[OURS], "ms"),
        ],
        {
            "ms_per_step": typical,
            "blocks_ms": {k: [round(t, 2) for t in v] for k, v in times.items()},
        },
    )


if __name__ == "__main__":
    main()
