"""What a long search costs its driver: 200 queued trials on a cluster of many logical nodes.

    python tests/benchmarks/queue_of_trials.py

Only scheduling is measured: raybert's own search draws, queues, watches and keeps the ledger of
trials that report three scores and train nothing. The nodes are Ray's, each with its own raylet, on
this machine; all claim more CPUs than there are.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from common import Figure, options, publish

MIB = 2**20


def trial(config: dict[str, Any], work: Any) -> None:
    """In place of a training run: what one reports, at once."""
    from ray import tune

    for percent in (25.0, 50.0, 100.0):
        score = config["values"]["train.lr"] * percent
        told = {"score": score, "percent": percent, "values": config["values"], "step": percent}
        tune.report({**told, "finished": True} if percent == 100 else told)


class Peak:
    """This process's resident memory, looked at ten times a second."""

    def __init__(self) -> None:
        self.process, self.seen, self.stop = psutil.Process(), [], threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stop.wait(0.1):
            self.seen.append(self.process.memory_info().rss)

    def end(self) -> list[int]:
        """All that was seen, in bytes."""
        self.stop.set()
        self.thread.join()
        return self.seen


def measure(args: Any, folder: Path) -> dict[str, Any]:
    """Seconds, and the driver's memory, of a search without training."""
    import ray
    from ray import tune
    from ray.cluster_utils import Cluster

    import raybert.tuning as tuning
    from raybert.draws import make_source
    from raybert.ledger import Ledger
    from raybert.objectives import parse_objectives
    from raybert.recipe_file import recipe_from
    from raybert.shares import Shares
    from raybert.space import make_space
    from raybert.trial import Work

    recipe = recipe_from({"out": str(folder)})
    space = make_space({"train.lr": tune.loguniform(1e-5, 1e-3)}, "rates", recipe)
    objectives = parse_objectives("score", ["accuracy"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": args.slots})
    try:
        for _ in range(args.nodes - 1):
            cluster.add_node(num_cpus=args.slots, object_store_memory=80 * MIB)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        tuning.run_trial = trial
        slots = args.nodes * args.slots
        keys = tuple(space.axes)
        work = Work(recipe, folder, objectives, 1, 0.0, False, keys, {}, None, "")
        ledger = Ledger(folder)
        runner = tuning.Runner(
            work,
            Shares(1, 0.0, slots),
            ledger,
            retries=0,
            deadline=float("inf"),
            last_start=float("inf"),
            loggers=[],
            tell=lambda text: None,
        )
        source = make_source("random", space, recipe, objectives, 0)
        peak, began = Peak(), time.perf_counter()
        runner.search(source, lambda values: "", args.trials, "none", space)
        seconds, seen = time.perf_counter() - began, peak.end()
        done = sum(entry.state == "finished" for entry in ledger.trials)
        assert done == args.trials, f"{done} of {args.trials} trials have finished"
    finally:
        ray.shutdown()
        cluster.shutdown()
    # The first fifth imports and starts; from then on a driver that keeps nothing does not grow.
    started = max(seen[: max(1, len(seen) // 5)])
    return {"seconds": seconds, "peak": max(seen), "growth": max(seen) - started, "slots": slots}


def main() -> None:
    """Measure, print and write."""
    parser = options("what queued trials cost the search's driver", model=False)
    parser.add_argument("--trials", type=int, help="(default: 200, with --quick 20)")
    parser.add_argument("--nodes", type=int, help="logical nodes (default: 16, with --quick 2)")
    parser.add_argument("--slots", type=int, default=2, help="CPUs a node claims (default: 2)")
    args = parser.parse_args()
    args.trials = args.trials or (20 if args.quick else 200)
    args.nodes = args.nodes or (2 if args.quick else 16)
    with tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        found = measure(args, Path(folder))
    figures = [
        Figure("driver's peak resident memory", found["peak"] / MIB, "MiB", 1024),
        Figure("its growth after the first fifth", found["growth"] / MIB, "MiB", 100),
        Figure("scheduling, a trial", 1000 * found["seconds"] / args.trials, "ms"),
    ]
    title = f"{args.trials} trials that train nothing, {found['slots']} at once"
    publish(args, title, figures, {**found, "trials": args.trials, "nodes": args.nodes})


if __name__ == "__main__":
    main()
