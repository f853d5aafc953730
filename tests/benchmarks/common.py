"""What the benchmarks share: options, a worker to be driven step by step, turns, result files."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

for key, value in (
    ("HF_HUB_OFFLINE", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    ("TRANSFORMERS_VERBOSITY", "error"),
    ("DEEPSPEED_LOG_LEVEL", "error"),
    ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
):
    os.environ.setdefault(key, value)

if TYPE_CHECKING:
    from raybert.config import Recipe
    from raybert.phase import Phase
    from raybert.train import Trainer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUICK_RESULTS = HERE.parents[1] / "build" / "benchmarks"
"""Where trials with ``--quick`` go: git ignores it, and no README shows their numbers."""

PACKAGES = ("raybert", "torch", "transformers", "deepspeed", "ray", "tokenizers", "numpy")

ABSOLUTE = re.compile(r"(?:^|[\s='\"(])(?:/\w|~/|[A-Za-z]:\\)")

Batch = dict[str, Any]
Step = tuple[list[Batch], int]
"""What the loop gets for a step: its forward passes' batches, and the rows of them all."""


# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One number that a benchmark is about.

    Attributes:
        what: what was measured, for a table.
        measured: the number.
        unit: what follows it: ``x``, ``%``, ``GiB``, ``ms``.
        limit: the target; ``None`` where there is none.
        at_most: whether the number is to stay at or below the limit, or to reach it.
    """

    what: str
    measured: float
    unit: str
    limit: float | None = None
    at_most: bool = True

    @property
    def target(self) -> str:
        """The target as text."""
        if self.limit is None:
            return ""
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g} {self.unit}"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` without one."""
        if self.limit is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit

    def as_json(self) -> dict[str, Any]:
        """The figure with its target and whether that is met."""
        measured = float(f"{self.measured:.4g}")
        return {**asdict(self), "measured": measured, "target": self.target, "met": self.met}


@dataclass(frozen=True)
class Speedup:
    """How many times faster than its teacher a model is at one shape.

    Attributes:
        model: what it is called in the table.
        backend: ``torch`` or ``onnx``.
        batch: B.
        length: T, in tokens.
        speedup: of medians.
        aim: what it is to reach; ``None`` where there is none.
        counted: what FLOPs alone would make it, where they say more than the model's name.
    """

    model: str
    backend: str
    batch: int
    length: int
    speedup: float
    aim: float | None = None
    counted: float | None = None

    @property
    def figure(self) -> Figure:
        """As a number beside its target."""
        where = {"torch": "PyTorch", "onnx": "ONNX Runtime"}[self.backend]
        counted = f" (counted {self.counted:.2f} x)" if self.counted else ""
        what = f"{self.model} in {where}, batch {self.batch} x {self.length}, faster by{counted}"
        return Figure(what, self.speedup, "x", self.aim, at_most=False)


def processor(hardware: Mapping[str, Any]) -> str:
    """The kind of processor as far as speed-ups depend on it: the newest of its instruction sets
    that products of numbers use."""
    if hardware["gpu"]:
        return "gpu"
    known = {"AMX": "amx", "AVX512-VNNI": "vnni", "AVX512": "avx512", "AVX2": "avx2"}
    return next((kind for name, kind in known.items() if name in hardware["instructions"]), "cpu")


def shown_path(path: str | Path) -> str:
    """A path's last two components: what others need to know of it."""
    return "/".join(Path(path).expanduser().parts[-2:]).lstrip("/")


def shown_command(argv: Sequence[str]) -> str:
    """The command as others would type it: paths outside this repository are shortened."""
    words = [shown_path(word) if "/" in word else word for word in argv[1:]]
    return " ".join(["python", f"tests/benchmarks/{Path(argv[0]).name}", *words])


def versions() -> dict[str, str]:
    """Versions of what the measured code runs on; those not installed are left out."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def today() -> str:
    """The day, in UTC."""
    return datetime.now(timezone.utc).date().isoformat()


def write_json(file: Path, data: Any) -> None:
    """Write a result whole or not at all; a machine's own paths have no place in it.

    Raises:
        ValueError: a string in it holds an absolute path.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False)
    for line in text.splitlines():
        if ABSOLUTE.search(line):
            raise ValueError(f"an absolute path would be published in {file.name}: {line.strip()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, file)


def publish(
    args: argparse.Namespace,
    title: str,
    figures: Sequence[Figure],
    details: Mapping[str, Any],
    speedups: Sequence[Speedup] = (),
    variant: str = "",
) -> None:
    """Print the figures as a table and write them, with all they depend on, to the results.

    Speed-ups depend on the processor: results with some are kept for each kind of it; and each
    variant of a benchmark has results of its own.
    """
    from raybert.bench import hardware
    from raybert.tables import markdown_table

    machine, name = hardware(), Path(sys.argv[0]).stem + variant
    rows = [
        [f.what, f"{f.measured:.4g} {f.unit}", f.target, {None: "", True: "yes"}.get(f.met, "NO")]
        for f in [*(one.figure for one in speedups), *figures]
    ]
    print(f"{title}\n\n{markdown_table(['what', 'measured', 'target', 'met'], rows)}\n")
    result = {
        "name": name,
        "title": title,
        "quick": args.quick,
        "command": shown_command(sys.argv),
        "date": today(),
        "speedups": [asdict(one) for one in speedups],
        "figures": [figure.as_json() for figure in figures],
        "details": dict(details),
        "versions": versions(),
        "hardware": machine,
    }
    kind = f".{processor(machine)}" if speedups else ""
    file = (QUICK_RESULTS if args.quick else RESULTS) / f"{name}{kind}.json"
    write_json(file, result)
    print(f"written to {file.relative_to(HERE.parents[1])}")


def options(
    description: str, *, data: bool = False, model: bool = True, timed: bool = False
) -> argparse.ArgumentParser:
    """The options of all benchmarks; ``--data``, ``--model``, and what latency is timed with, where
    they mean something."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a trial: too short to be believed")
    if data:
        parser.add_argument("--data", help="an MRPC folder (default: the generated demo task)")
    if model:
        parser.add_argument("--model", help="encoder (default: the demo extra's, 6 layers x 384)")
    if timed:
        parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
        parser.add_argument("--seconds", type=float, default=10.0, help="timed, a shape and model")
    return parser


def encoder(args: argparse.Namespace) -> str:
    """The encoder that was asked for."""
    from raybert.plan import demo_encoder

    return args.model or demo_encoder()


def latencies(
    args: argparse.Namespace, backend: str, paths: Mapping[str, Path], shapes: Any
) -> list[dict[str, Any]]:
    """Rows of `raybert.latency.latency` on the CPU, timed as the options say."""
    from raybert.latency import latency

    seconds = 0.2 if args.quick else args.seconds
    device = "cpu" if backend == "torch" else None
    chosen: Any = backend
    return latency(
        paths, shapes, backend=chosen, threads=args.threads, device=device, seconds=seconds
    )


def against_teacher(
    rows: Sequence[Mapping[str, Any]],
    aims: Mapping[tuple[str, int, int], float] | None = None,
    *,
    best_form: bool = False,
) -> list[Speedup]:
    """How many times faster than ``teacher`` each model is, by medians of one shape.

    Args:
        rows: of `raybert.latency.latency`, of one or several backends.
        aims: (model, batch, length) -> what it is to reach.
        best_form: against the teacher in whichever backend it is fastest in, rather than in the
            model's own.
    """
    from raybert.latency import speedups

    rows = list(rows)
    if best_form:
        fastest: dict[tuple[int, int], float] = {}
        for row in rows:
            if row["model"] == "teacher":
                shape = row["batch"], row["length"]
                fastest[shape] = min(row["p50_ms"], fastest.get(shape, row["p50_ms"]))
        rows = [
            {**row, "p50_ms": fastest[row["batch"], row["length"]]}
            if row["model"] == "teacher"
            else row
            for row in rows
        ]
    return [
        Speedup(**row, aim=(aims or {}).get((row["model"], row["batch"], row["length"])))
        for row in speedups(rows, "teacher")
    ]


# -- turns -----------------------------------------------------------------------------------------


def alternate(
    variants: Mapping[str, Callable[[Sequence[Step]], Any]],
    blocks: Sequence[Sequence[Step]],
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Give every variant every block of steps in turns A, B, C, A, B, C, ..., so that heat,
    frequency and neighbours fall on all alike.

    Args:
        variants: name -> what runs a block.
        blocks: the first is a warm-up and is not timed.
        wait: until the device has done all it was told.

    Returns:
        For each variant its milliseconds per step in each timed block.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number, block in enumerate(blocks):
        for name, run in variants.items():
            wait()
            began = time.perf_counter()
            run(block)
            wait()
            if number:
                times[name].append((time.perf_counter() - began) * 1000 / len(block))
    return times


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """The median over blocks of one variant's time by another's, on the same steps."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Milliseconds per step of each variant: the median over its blocks."""
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


# -- one worker, driven step by step ---------------------------------------------------------------


class Silence:
    """Hooks of a run that nobody listens to."""

    def report(self, metrics: dict[str, Any]) -> None:
        """Nobody asks."""

    def saved(self, checkpoint: Path) -> None:
        """Nobody waits for it."""

    def progress(self, total: int, label: str) -> Any:
        """No bar: the benchmarks drive the loop themselves."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Nobody reads."""


@contextlib.contextmanager
def single_worker() -> Iterator[Path]:
    """A process group of one, set up as `raybert.run` does, and a folder for what is written."""
    import torch
    import torch.distributed as dist

    from raybert.engine import alone, init_distributed

    with alone(), tempfile.TemporaryDirectory(prefix="raybert-benchmark-") as folder:
        init_distributed(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), 10.0)
        yield Path(folder)
        dist.destroy_process_group()


def recipe_for(args: argparse.Namespace, folder: Path, **keys: Any) -> Recipe:
    """A fine-tuning recipe in float32 for MRPC's rows if they were given, else the demo task's."""
    from raybert.recipe_file import recipe_from

    data = {"cache": str(folder / "cache"), **({"source": args.data} if args.data else {})}
    train = {"precision": "fp32", "lr": 5e-5, "batch_size": 8 if args.quick else 32}
    task = "mrpc" if args.data else "demo"
    base = {"task": task, "data": data, "train": train, "out": str(folder / "run")}
    return recipe_from({**base, "model": encoder(args), **keys})


def make_trainer(
    recipe: Recipe, teacher: str | None = None, predictions: Path | None = None
) -> Trainer:
    """raybert's own worker for a recipe, its rows tokenised."""
    import torch

    from raybert.checkpoint import World
    from raybert.data import prepare
    from raybert.models import load_tokenizer
    from raybert.train import Job, Trainer

    assert recipe.model is not None
    data = prepare(recipe.task, recipe.data, load_tokenizer(recipe.model))
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    job = Job(recipe, data.folder, recipe.model, teacher, False, predictions)
    return Trainer(job, World(0, 1, device), Silence())


def steps_of(trainer: Trainer, first: int, count: int) -> list[Step]:
    """The very batches that the trainer would train on, from step ``first`` on."""
    from raybert.step import Recent

    recent = Recent(trainer.world, trainer.recipe.train.accumulation)
    return list(trainer._batches(first, first + count, recent))


def blocks_of(trainer: Trainer, blocks: int, size: int) -> list[list[Step]]:
    """Consecutive blocks of the trainer's steps, one more than asked for: the warm-up."""
    steps = steps_of(trainer, 0, (blocks + 1) * size)
    return [steps[at : at + size] for at in range(0, len(steps), size)]


def waiter(trainer: Trainer) -> Callable[[], None]:
    """What waits until the trainer's device has done all it was told."""
    import torch

    return torch.cuda.synchronize if trainer.world.device.type == "cuda" else (lambda: None)


class Worker:
    """raybert's step: what `Trainer._train` does between two evaluations, on its own batches.

    Batches come through the trainer's own prefetching thread, started anew for each block as it is
    for each epoch, so that what a step waits for them is part of its time.

    Attributes:
        waited: seconds that the steps have waited for batches.
        seconds: wall-clock seconds of all steps.
    """

    def __init__(self, trainer: Trainer, phase: Phase, total: int, teacher: Any = None) -> None:
        from raybert.checkpoint import Position
        from raybert.engine import make_engine
        from raybert.rates import parameter_groups

        self.trainer, self.phase, self.total = trainer, phase, total
        trainer.position = Position()
        self.waited = self.seconds = 0.0
        model, _ = trainer._build(0)
        phase.prepare(model)
        model.to(trainer.world.device)
        groups = parameter_groups(model, phase, trainer.recipe.train)
        self.engine = make_engine(model, groups, trainer.recipe, trainer.precision)
        self.distil = trainer.distiller(self.engine, phase, teacher)
        self.engine.train()

    def __call__(self, block: Sequence[Step]) -> None:
        """Train on the next ``len(block)`` steps, whose batches the trainer makes itself."""
        from raybert.step import Recent

        trainer = self.trainer
        began = time.perf_counter()
        recent = Recent(trainer.world, trainer.recipe.train.accumulation)
        first = trainer.position.step
        for micro, rows in trainer._batches(first, first + len(block), recent):
            trainer.step(self.distil, self.total, micro, rows, recent)
        recent.settle(trainer.position.step, self.phase.name)
        self.waited += recent.waited
        self.seconds += time.perf_counter() - began
